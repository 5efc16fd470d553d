"""What is emitted, read as each stack reads it and applied to a small model, gives exactly the planned adapters."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
import yaml
from datasets import Dataset
from plans_and_readers import (
    HALF,
    MLP,
    PLANS,
    READ,
    adapters,
    encoder_plan,
    llama,
    make_plan,
    named,
    planned,
    random_plan,
    read_trl,
    read_types,
)
from plans_and_readers import ranks_of as ranks
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import weightlora
from weightlora.cli import main
from weightlora.errors import OptionError, OutputError, PlanError, StackError
from weightlora.model.layers import lora_layers
from weightlora.plan.plan import read_adapter
from weightlora.serving.adapter import read_files
from weightlora.stacks import STACKS, stack_of
from weightlora.stacks.emit import emit
from weightlora.tasks.embedded import minilm

PEFT_STACKS = (*READ, "trl")
TYPES = ("torchtune", "litgpt")


def applied(stack, make, plan, folder):
    """A small model with what ``stack`` makes of its configuration, printed or in a folder."""
    folder.mkdir(exist_ok=True)
    try:
        text = emit(plan, stack)
    except OptionError:
        text = emit(plan, stack, folder / "out")
    return read_trl(make(), text, folder / "c.yaml") if stack == "trl" else READ[stack](make(), text)


@pytest.mark.sampled(40)
@pytest.mark.parametrize("stack", PEFT_STACKS)
@pytest.mark.parametrize("name", PLANS)
def test_the_adapters_are_the_plan(stack, name, tmp_path):
    make, plan = PLANS[name]
    model = applied(stack, make, plan, tmp_path)
    assert adapters(model) == planned(plan)
    for layer in lora_layers(model).values():
        assert layer.lora_A["default"].weight.requires_grad
        assert not layer.lora_B["default"].weight.any()
        assert getattr(layer.lora_dropout["default"], "p", 0) == plan.lora.get("lora_dropout", 0)
    trained = {n.split(".modules_to_save")[0].split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert ("lm_head" in trained) == ("modules_to_save" in plan.lora)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("seed", range(16))
def test_random_plans(seed, tmp_path):
    make, plan = random_plan(seed)
    for stack in PEFT_STACKS:
        assert adapters(applied(stack, make, plan, tmp_path / stack)) == planned(plan), stack


@pytest.mark.parametrize(
    ("stack", "needs"),
    [
        ("axolotl", {"alpha with a fraction", "fractions"}),
        (
            "llamafactory",
            {"alpha with a fraction", "endings", "some excluded", "some layers"},
        ),
        ("swift", set()),
    ],
)
def test_an_adapter_directory_only_where_options_cannot_say_it(stack, needs):
    unequal = {name for name in PLANS if "unequal" in name or name in ("fractions", "endings, all kept")}
    needs = needs | (set() if stack == "axolotl" else unequal)

    def is_needed(plan):
        try:
            emit(plan, stack)
        except OptionError:
            return True
        return False

    assert {name for name, (_, plan) in PLANS.items() if is_needed(plan)} == needs


def test_the_command_line_of_trl_only_where_its_options_can_say_it():
    code = {name for name, (_, plan) in PLANS.items() if "import" in emit(plan, "trl")}
    unequal = {name for name in PLANS if "unequal" in name or "fraction" in name or name == "endings, all kept"}
    assert code == unequal


@pytest.mark.parametrize("stack", TYPES)
@pytest.mark.parametrize(
    "kept", [("q_proj",), ("k_proj", "o_proj"), MLP, ("q_proj", "v_proj", *MLP), ("q_proj", "k_proj", "v_proj")]
)
def test_whole_types(stack, kept):
    plan = make_plan(llama, ranks(named(*kept), 4), 12)
    assert read_types(stack, emit(plan, stack)) == (set(kept), 4, 3)


@pytest.mark.parametrize("stack", TYPES)
@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (PLANS["2 of 28 sites"][1], r"all layers or in none, and the plan has self_attn.v_proj in 2 of 4"),
        (
            make_plan(llama, ranks(named("q_proj", "v_proj"), 4, 8)),
            "one rank for all adapters, and the plan has 4 to 8",
        ),
        (make_plan(llama, ranks(named("up_proj"), 4)), "whole MLP or nothing of it, and the plan has only mlp.up_proj"),
        (make_plan(llama, ranks(named("q_proj"), 4), use_rslora=True), "no option for use_rslora=True"),
        (make_plan(llama, ranks(named("q_proj"), 4), layers_to_transform=[0, 1, 2, 3]), "a part of the model"),
        (encoder_plan(["encoder.layer.0.attention.self.query"]), "the plan has attention.self.query"),
    ],
)
def test_what_whole_types_cannot_express(stack, plan, said, tmp_path):
    for output in (None, tmp_path / "out"):
        with pytest.raises(StackError, match=said) as caught:
            emit(plan, stack, output)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_the_plan_does_not_know(tmp_path):
    """The base model has four layers, and the plan was made for two."""
    llama().config.save_pretrained(tmp_path)
    plan = make_plan(llama, ranks(named("q_proj"), 4))
    entries = tuple(entry for entry in plan.entries if entry.site.name in named("q_proj", layers=(0, 1)))
    half = replace(plan, entries=entries)
    assert "q_proj" in emit(half, "torchtune")
    with pytest.raises(StackError, match="in 2 of 4"):
        emit(replace(half, base_model=str(tmp_path)), "torchtune")


# -- the new adapter --------------------------------------------------------------------------------------------------

UNEQUAL = PLANS["unequal ranks and alphas"][1]


def test_the_new_adapter_is_initialised_as_by_peft(tmp_path):
    emit(UNEQUAL, "swift", tmp_path / "a")
    emit(UNEQUAL, "swift", tmp_path / "b")
    emit(replace(UNEQUAL, seed=8), "swift", tmp_path / "c")
    a, b, c = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc")
    wide = [(name, tensor) for name, tensor in a.items() if "lora_A" in name]
    assert len(wide) == len(UNEQUAL.names)
    for name, tensor in wide:
        bound = tensor.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / (1 + 5)) / sqrt(fan_in)
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > bound / 2  # all of at least 32 numbers below half of it: 2^-32
        assert tensor.min() < 0 < tensor.max()
        assert torch.equal(tensor, b[name])
        assert not torch.equal(tensor, c[name])
    assert not any(tensor.any() for name, tensor in a.items() if "lora_B" in name)


def test_the_new_adapter_can_be_shown_and_names_its_base(tmp_path):
    emit(replace(UNEQUAL, base_model="some/model"), "swift", tmp_path / "out")
    folder = tmp_path / "out" / "adapter"
    assert read_adapter(folder).ranks == UNEQUAL.ranks
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    assert {own.site.name: (own.r, own.scale) for own in read_files(folder).sites} == planned(UNEQUAL)


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"task_type": "SEQ_CLS"},
    ],
)
def test_an_adapter_that_needs_the_base_weights(field, tmp_path):
    plan = make_plan(llama, ranks(HALF, 2, 4), **field)
    with pytest.raises(StackError, match=next(iter(field))):
        emit(plan, "llamafactory", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for stack in ("peft", "trl"):
        assert f"{next(iter(field))}=" in emit(plan, stack)


# -- files and the command line ---------------------------------------------------------------------------------------


def test_a_folder_with_other_files_stays(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1")
    with pytest.raises(OutputError, match=r"mine\.yaml"):
        emit(UNEQUAL, "axolotl", tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == "a: 1"


def test_an_output_is_replaced_whole(tmp_path, monkeypatch):
    out = tmp_path / "out"
    text = emit(UNEQUAL, "llamafactory", out)
    assert (out / "llamafactory.yaml").read_text() == text
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OutputError, match="No space"):
        emit(replace(UNEQUAL, seed=9), "llamafactory", out)
    assert (out / "llamafactory.yaml").read_text() == text
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    emit(PLANS["one rank"][1], "llamafactory", out)
    assert [path.name for path in tmp_path.rglob("[!.]*") if path.is_file()] == ["llamafactory.yaml"]


def fail(*_, **__):
    raise SafetensorError("No space left on device")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    UNEQUAL.save("plan.json")
    assert main(["emit", "plan.json", "--for", "axolotl"]) == 0
    assert capsys.readouterr().out == emit(UNEQUAL, "axolotl")
    assert main(["emit", "plan.json", "--for", "swift", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out == "wrote adapter and swift.yaml in out\n"
    assert yaml.safe_load((tmp_path / "out" / "swift.yaml").read_text())["adapters"] == ["out/adapter"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--for", "axolotle"], "closest: 'axolotl'"),
        (["--for", "litgpt"], "LitGPT 0.5.13 adapts a projection in all layers or in none, and the plan has"),
        (["--for", "swift"], "one rank for all adapters, and the plan has 2 to 8; give --output"),
        (["--for", "swift", "--output_dir", "."], "holds plan.json, which"),
    ],
)
def test_a_mistake_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    UNEQUAL.save("plan.json")
    assert main(["emit", "plan.json", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_plan_without_sites():
    for entry in STACKS:
        with pytest.raises(PlanError, match="keeps no site"):
            weightlora.emit(make_plan(llama, {}), entry.name)


def test_every_stack_is_tested():
    assert {entry.name for entry in STACKS} == {*PEFT_STACKS, *TYPES}
    assert stack_of("trl").version == version("trl")
    assert stack_of("peft").version == version("peft")


# -- TRL itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one rank", "one site", "2 of 28 sites"])
def test_trl_trains_what_its_command_line_reads(name, tmp_path):
    plan = PLANS[name][1]
    (tmp_path / "trl.yaml").write_text(emit(plan, "trl"))
    parser = TrlParser([SFTConfig, ModelConfig])
    words = ["--config", str(tmp_path / "trl.yaml"), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    words += ["--use_cpu", "--report_to", "none", "--bf16", "false", "--per_device_train_batch_size", "2"]
    words += ["--save_strategy", "no", "--learning_rate", "0.01", "--disable_tqdm", "true"]
    arguments, model_arguments = parser.parse_args_and_config(words, fail_with_unknown_args=True)
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4)
    trainer = SFTTrainer(
        llama(),
        arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(str(minilm())),
        peft_config=get_peft_config(model_arguments),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert adapters(trainer.model) == planned(plan)
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(trainer.model).values())
