"""What is scored is what will be trained on: rows that can be read again, NEFTune's noise, a batch that fits."""

import pytest
import torch
from datasets import IterableDataset as Streamed
from small_models import tiny_rows
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import weightlora
from weightlora.errors import OptionError, SelectionError

ASKED = {"adapters": 2, "rule": "first_order", "steps": 2}


class ItsOwnIterator(IterableDataset):
    def __init__(self, drawn):
        self.drawn = drawn

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn.append(1)
        return tiny_rows(1)[0]


class OneGenerator(IterableDataset):
    """Each iterator is new, and all read from the same generator."""

    def __init__(self, drawn):
        self.source = (drawn.append(1) or row for row in tiny_rows())

    def __iter__(self):
        yield from self.source


class Zipped(OneGenerator):
    def __init__(self, drawn):
        self.source = zip(tiny_rows(), OneGenerator(drawn).source, strict=True)


class Again(IterableDataset):
    def __iter__(self):
        yield from tiny_rows()


@pytest.mark.parametrize("kind", [ItsOwnIterator, OneGenerator, Zipped])
def test_rows_that_can_be_read_once_are_refused_before_one_is_drawn(make_tiny, kind):
    drawn = []
    trainer = make_tiny(rows=kind(drawn))
    with pytest.raises(OptionError, match=rf"{kind.__name__}\) can be read only once.*__iter__, or select") as caught:
        weightlora.select_for(trainer, **ASKED)
    assert "\n" not in str(caught.value)
    assert drawn == []
    if kind is not Zipped:  # whose rows are pairs
        trainer.train()  # nothing was changed
        assert trainer.state.global_step == 2
    weightlora.method_for(make_tiny("elsewhere", rows=kind(drawn)), "random", adapters=1)  # it reads none


@pytest.mark.parametrize("rows", [Again(), Streamed.from_generator(lambda: iter(tiny_rows()))], ids=["torch", "hf"])
def test_rows_that_are_streamed_again_are_scored_trained_on_and_found_again(make_tiny, rows):
    trainer = make_tiny(rows=rows)
    plan = weightlora.select_for(trainer, **ASKED)
    trainer.train()
    assert trainer.state.global_step == 2
    assert weightlora.select_for(make_tiny(rows=rows), **ASKED) == plan


def test_scores_have_the_noise_of_the_training(make_tiny):
    """The reference is the same selection with a loss that switches the noise on by itself."""

    def noisy(model, step):
        handle = activate_neftune(model, 20.0)
        for inputs in step[0]:
            yield model(**inputs).loss
        deactivate_neftune(model, handle)

    trainer = make_tiny(neftune_noise_alpha=20.0)
    plan = weightlora.select_for(trainer, **ASKED)
    assert plan.history == weightlora.select_for(make_tiny("reference"), loss_fn=noisy, **ASKED).history
    assert plan.history != weightlora.select_for(make_tiny("quiet"), **ASKED).history  # negative control
    embeddings = trainer.model.get_input_embeddings()
    assert not embeddings._forward_hooks
    assert "neftune_noise_alpha" not in vars(embeddings)
    trainer.train()


@pytest.mark.parametrize("auto", [True, False])
def test_a_batch_that_does_not_fit_while_scoring_is_one_line(make_tiny, auto):
    class Large(Trainer):
        def compute_loss(self, *args, **kwargs):
            torch.empty(2**60, dtype=torch.uint8)  # what the allocator says by itself
            return super().compute_loss(*args, **kwargs)

    trainer = make_tiny(kind=Large, auto_find_batch_size=auto)
    words = r"2 rows at once did not fit.*lower per_device_train_batch_size and raise gradient_accumulation_steps"
    with pytest.raises(SelectionError, match=words) as caught:
        weightlora.select_for(trainer, **ASKED)
    assert "\n" not in str(caught.value)
    assert ("auto_find_batch_size" in str(caught.value)) == auto
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(SelectionError, match="would train plain LoRA"):
        trainer.train()


def test_another_error_of_the_loss_stays_what_it_is(make_tiny):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):  # noqa: ARG002
            raise RuntimeError("no reason")

    with pytest.raises(RuntimeError, match=r"^no reason$"):
        weightlora.select_for(make_tiny(kind=Broken), **ASKED)
