"""``select_for`` prints the plan's screen once, unless it is told not to."""

import pytest
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import weightlora

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 400


class Unread:
    """Rows that must not be read."""

    def __len__(self):
        return 400

    def __getitem__(self, place):
        raise AssertionError("a row was read")


@pytest.fixture
def make_trainer(tmp_path):
    def make(rows=ROWS, **arguments):
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        )
        quiet = {"report_to": "none", "use_cpu": True, "max_steps": 100, "per_device_train_batch_size": 2}
        arguments = TrainingArguments(str(tmp_path / str(len([*tmp_path.iterdir()]))), **quiet, **arguments)
        return Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows)

    return make


LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


def test_the_screen_is_printed_once_and_says_what_scoring_took(make_trainer, capsys):
    plan = weightlora.select_for(make_trainer(disable_tqdm=False), lora=LORA, adapters=2)
    printed = capsys.readouterr().out
    assert printed.count(str(plan)) == 1
    assert plan.spent == {"scoring_steps": 3, "total_steps": 100}  # 3 % of them
    assert "scoring   3 steps (3.0 % of 100)" in printed


@pytest.mark.parametrize(("quiet", "disable_tqdm"), [({"progress": False}, False), ({}, True)])
def test_it_is_silent_where_asked(make_trainer, capsys, quiet, disable_tqdm):
    weightlora.select_for(make_trainer(disable_tqdm=disable_tqdm), lora=LORA, parameters=0.5, **quiet)
    assert "asked" not in capsys.readouterr().out


def test_with_parameters_alone_nothing_is_scored_and_nothing_spent(make_trainer, capsys):
    trainer = make_trainer(rows=Unread(), disable_tqdm=False)
    plan = weightlora.select_for(trainer, lora=LORA, parameters=0.5)
    assert plan.spent == {}
    assert "none: nothing is scored" in capsys.readouterr().out
    assert {layer.r["default"] for name, layer in trainer.model.named_modules() if name.endswith("q_proj")} == {4}
