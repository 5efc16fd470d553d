"""What is scored is what will be trained on, and trainers that train on something else are refused."""

import importlib
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as Streamed
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from small_models import tiny_rows
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import weightlora
from weightlora.errors import OptionError, SelectionError
from weightlora.model.layers import lora_layers
from weightlora.tasks.embedded import smollm2
from weightlora.trainer.loader import require_usable_batches

# -- rows that can be read again, NEFTune's noise, a batch that fits -------------------------------------------------

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


# -- what the loader yields must be what is trained on, or nothing is touched ----------------------------------------

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "bf16": False}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def chat_tokenizer():
    return AutoTokenizer.from_pretrained(str(smollm2().parent), gguf_file=smollm2().name)


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def generating(kind: str, tokenizer, folder, peft_config):
    """A trainer that generates its completions."""
    make, config = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[kind]
    sizes = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}
    return make(
        model=llama(len(tokenizer)),
        reward_funcs=reward,
        args=config(output_dir=str(folder), save_strategy="no", **sizes, **QUIET),
        train_dataset=Dataset.from_list([{"prompt": f"What is {i} plus 2?"} for i in range(8)]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_generating_trainer_is_refused_untouched_and_the_two_steps_work(kind, chat_tokenizer, tmp_path):
    trainer = generating(kind, chat_tokenizer, tmp_path / "refused", deepcopy(LORA))
    callbacks, modules = list(trainer.callback_handler.callbacks), list(trainer.model.named_modules())
    with pytest.raises(
        OptionError, match=rf"{kind}Trainer makes its batches .*peft_config=plan.to_lora_config"
    ) as caught:
        weightlora.select_for(trainer, adapters=1)
    assert "\n" not in str(caught.value)
    assert trainer.callback_handler.callbacks == callbacks
    assert list(trainer.model.named_modules()) == modules
    assert not (tmp_path / "refused" / "plan.json").exists()

    ids = torch.arange(24).reshape(3, 8)
    batches = [{"input_ids": ids, "labels": ids}] * 2
    plan = weightlora.select(llama(len(chat_tokenizer)), batches, lora=LORA, adapters=1, steps=2, progress=False)
    planned = generating(kind, chat_tokenizer, tmp_path / "planned", plan.to_lora_config())
    plan.check(planned.model)
    planned.train()
    plan.check(planned.model)


USABLE = [
    "trainer.sft_trainer.SFT",
    "trainer.dpo_trainer.DPO",
    "trainer.kto_trainer.KTO",
    "trainer.reward_trainer.Reward",
]
NOT_USABLE = [
    "trainer.grpo_trainer.GRPO",
    "trainer.rloo_trainer.RLOO",
    "trainer.distillation_trainer.Distillation",
    "experimental.online_dpo.OnlineDPO",
    "experimental.gkd.GKD",
    "experimental.gold.GOLD",
    "experimental.gmpo.GMPO",
    "experimental.sdft.SDFT",
]


def of_kind(name: str) -> Trainer:
    """A trainer that was not initialised: only its class matters."""
    module, _, kind = f"trl.{name}Trainer".rpartition(".")
    made = getattr(importlib.import_module(module), kind)
    return made.__new__(made)


@pytest.mark.parametrize("name", USABLE)
def test_trainers_that_train_on_their_loaders_batches_are_usable(name):
    require_usable_batches(of_kind(name))


def test_transformers_trainers_and_those_of_a_script_are_usable():
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    for kind in (Trainer, Seq2SeqTrainer, Own):
        require_usable_batches(kind.__new__(kind))


@pytest.mark.parametrize("name", NOT_USABLE)
def test_trainers_that_generate_what_they_train_on_are_not(name):
    with pytest.raises(OptionError, match="makes its batches while it trains"):
        require_usable_batches(of_kind(name))


def small(folder, kind=Trainer, **fields) -> Trainer:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 400
    arguments = TrainingArguments(output_dir=str(folder), max_steps=1, save_strategy="no", **QUIET)
    return kind(llama(8), arguments, train_dataset=rows, **fields)


def listed(rows: list[dict]) -> list[dict]:
    return rows  # as GRPO's collator does


def prompts(rows: list[dict]) -> dict:
    return {"prompt_input_ids": torch.tensor([row["input_ids"] for row in rows])}  # as online DPO's does


@pytest.mark.parametrize("collator", [listed, prompts])
@pytest.mark.parametrize("method", ["selected", "lora_drop"])
def test_a_loss_that_fails_on_the_loaders_batches_is_one_line(collator, method, tmp_path):
    trainer = small(tmp_path, data_collator=collator)
    with pytest.raises(OptionError, match=r"Trainer.compute_loss fails on a batch of its own loader") as caught:
        weightlora.method_for(
            trainer, method, lora=LORA, adapters=1, **({"rule": "first_order"} if method == "selected" else {})
        )
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert type(trainer.model) is LlamaForCausalLM


def test_methods_that_read_no_batches_need_none(tmp_path):
    class Generating(Trainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(inputs)

    trainer = small(tmp_path, Generating)
    assert len(weightlora.method_for(trainer, "random", lora=LORA, adapters=1).plan.names) == 1


# -- sentence transformers, whose package is not needed here -----------------------------------------------------------


def sentence_trainers() -> list[type[Trainer]]:
    """Classes that the package has, and one of a script; from 6.0 a cross encoder's trainer has another base."""

    def of_package(name: str, base: type[Trainer]) -> type[Trainer]:
        return type(name, (base,), {"__module__": "sentence_transformers.base.trainer"})

    common = of_package("BaseTrainer", Trainer)
    kinds = [of_package(f"{kind}Trainer", common) for kind in ("SentenceTransformer", "CrossEncoder", "SparseEncoder")]
    return [*kinds, type("Own", (kinds[0],), {})]


class Sentences(nn.Sequential):
    """Shaped as a SentenceTransformer: its first module has the transformer in ``auto_model``."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self[0].auto_model = llama(8).model


@pytest.mark.parametrize("kind", sentence_trainers(), ids=lambda kind: kind.__name__)
def test_trainers_of_sentence_transformers_are_refused_with_the_way_round(kind, tmp_path):
    trainer = small(tmp_path, kind)
    with pytest.raises(
        OptionError, match=rf"{kind.__name__} saves.*select\(model\[0\].auto_model.*add_adapter"
    ) as caught:
        weightlora.select_for(trainer, lora=LORA)
    assert "\n" not in str(caught.value)
    assert type(trainer.model) is LlamaForCausalLM


def test_a_sentence_transformer_is_selected_on_by_its_transformer():
    sentences = Sentences()
    transformer = sentences[0].auto_model
    batches = [{"input_ids": torch.arange(6).reshape(2, 3)}] * 2

    def loss_fn(_: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computed by the whole model, in which the transformer carries the adapters."""
        return sentences[0].auto_model(**batch).last_hidden_state.square().mean()

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    plan = weightlora.select(transformer, batches, lora=lora, adapters=1, steps=2, loss_fn=loss_fn, progress=False)
    # What model.add_adapter does inside.
    inject_adapter_in_model(plan.to_lora_config(), transformer)
    plan.check(transformer)
    assert list(lora_layers(transformer)) == list(plan.names)
    assert not isinstance(transformer, PeftModel)
