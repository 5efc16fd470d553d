"""A trainer and its plan stay together: nothing is lost, another adapter is not trained, a mistake can be corrected."""

import pytest
import torch
from peft import LoraConfig
from small_models import tiny_llama
from transformers import Trainer, TrainingArguments

import weightlora
from weightlora.errors import OptionError, OutputError, SelectionError
from weightlora.model.layers import lora_layers

ASKED = {"adapters": 2, "rule": "first_order", "steps": 2}
OTHER = LoraConfig(r=2, target_modules=["k_proj"])


def test_a_second_adapter_is_not_deleted(make_tiny):
    trainer = make_tiny()
    trainer.model.add_adapter("other", OTHER)
    with pytest.raises(OptionError, match=r"has adapters default, other.*model.delete_adapter") as caught:
        weightlora.select_for(trainer, **ASKED)
    assert "\n" not in str(caught.value)
    assert set(trainer.model.peft_config) == {"default", "other"}
    assert lora_layers(trainer.model, "other")
    trainer.model.delete_adapter("other")  # as the text says
    assert len(weightlora.select_for(trainer, **ASKED).names) == 2


def test_a_second_adapter_named_as_trls_reference_is_not_deleted_either(make_tiny):
    trainer = make_tiny()
    trainer.model.add_adapter("ref", OTHER)
    with pytest.raises(OptionError, match="has adapters default, ref"):
        weightlora.select_for(trainer, **ASKED)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ({"adapters": 1.5}, OptionError),
        ({"adaptors": 2}, OptionError),
        ({"rule": "non"}, OptionError),
        ({}, SelectionError),
    ],
)
def test_after_a_mistake_the_same_trainer_is_selected_on(make_tiny, mistake, error):
    """Until then it refuses to train plain LoRA."""
    trainer, expected = make_tiny(), weightlora.select_for(make_tiny("elsewhere"), **ASKED)
    if error is SelectionError:
        mistake = {"loss_fn": lambda model, step: model(**step[0][0]).loss * float("nan")}
    with pytest.raises(error):
        weightlora.select_for(trainer, **{**ASKED, **mistake})
    with pytest.raises(SelectionError, match="would train plain LoRA"):
        trainer.train()
    plan = weightlora.select_for(trainer, **ASKED)
    assert plan == expected
    trainer.train()
    plan.check(trainer.model)


def test_a_failure_that_changed_the_adapters_is_no_start_for_another_selection(make_tiny, monkeypatch):
    """The planned sites would be all candidates of the second one."""

    def full(*_):
        raise OutputError("the disk is full")

    trainer = make_tiny()
    monkeypatch.setattr("weightlora.trainer.attach.keep_plan", full)
    with pytest.raises(OutputError):
        weightlora.select_for(trainer, **ASKED)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="make a new trainer"):
        weightlora.select_for(trainer, **ASKED)


@pytest.mark.parametrize("switch", ["one", "both"])
def test_another_active_adapter_is_not_trained_under_the_plan(make_tiny, switch):
    trainer = make_tiny()
    weightlora.select_for(trainer, **ASKED)
    trainer.model.add_adapter("other", OTHER)
    if switch == "one":
        trainer.model.set_adapter("other")
    else:
        trainer.model.base_model.set_adapter(["default", "other"])
    with pytest.raises(OptionError, match=r"active adapter is .*other.*model.set_adapter\('default'\)") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    trainer.model.set_adapter("default")  # as the text says
    trainer.train()
    trained = {n.split(".")[-2] for n, p in trainer.model.named_parameters() if "lora_B" in n and p.any()}
    assert trained == {"default"}


def test_a_model_that_train_makes_anew_is_refused_before_anything_is_scored(tmp_path):
    drawn = []

    class Rows(list):
        def __getitem__(self, i):
            drawn.append(i)
            return {"input_ids": torch.ones(4).long(), "labels": torch.ones(4).long()}

    trainer = Trainer(
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        model_init=tiny_llama,
        train_dataset=Rows([0] * 400),
    )
    with pytest.raises(OptionError, match=r"model_init.*give model=") as caught:
        weightlora.select_for(trainer, lora=LoraConfig(r=2, target_modules=["q_proj"]), adapters=1)
    assert "\n" not in str(caught.value)
    assert drawn == []
