"""``head_learning_rate``: the head moves at its own rate, the adapters at theirs, also after a kill."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from weightlora.cli import main
from weightlora.errors import OptionError
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import fit, plan, prepare, train
from weightlora.tasks.embedded import minilm

SHORT = {
    "task": "rotten_tomatoes",
    "max_train_samples": 16,
    "max_eval_samples": 4,
    "max_seq_length": 16,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def recipe(folder, **changed):
    options = {"method": "lora", **SHORT, **changed, "output_dir": folder}
    return read_recipe(words=[f"--{name}={value}" for name, value in options.items()])


def trained(folder, **changed):
    train(recipe(folder, **changed))
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def is_head(name):
    return ".lora_" not in name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["lora", "adalora", "increlora", "flexlora", "vera", "tied_lora"])
def test_the_head_has_a_group_of_its_own_beside_any_adapters(method, small_model, tmp_path):
    own = {"model_name_or_path": small_model, **({"method_options": "deltaT=1"} if method == "adalora" else {})}
    run = prepare(recipe(tmp_path, method=method, head_learning_rate=0.5, **own))
    fit(run, plan(run))
    head = {
        id(p) for name, p in run.trainer.model.named_parameters() if p.requires_grad and ".modules_to_save." in name
    }
    groups = run.trainer.optimizer.param_groups
    assert head
    for group in groups:
        ids = {id(p) for p in group["params"]}
        assert not ids or ids <= head or not ids & head
        assert group["initial_lr"] == (0.5 if ids and ids <= head else 1e-3)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in run.trainer.model.parameters())


def test_one_step_of_adam_moves_head_and_adapters_by_their_own_rates(tmp_path):
    # Adam's first step is learning_rate · g / (|g| + ε): learning_rate where the gradient is far above ε = 1e-8.
    one = {"max_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0, "max_grad_norm": 0}
    start = trained(tmp_path / "start", **one, learning_rate=0, head_learning_rate=0)
    moved = trained(tmp_path / "moved", **one, head_learning_rate=0.02)
    for name, weight in moved.items():
        rate = 0.02 if is_head(name) else 1e-3
        steps = (weight - start[name]).abs()
        assert steps.max() <= rate * (1 + 1e-4), name
        if ".lora_A" not in name:  # B is zero, so that A has no gradient yet
            assert steps.median() == pytest.approx(rate, rel=1e-3), name


@pytest.mark.slow
def test_the_same_rate_is_the_same_training_and_another_is_another(tmp_path):
    plain, same, other = (
        trained(tmp_path / name, **changed)
        for name, changed in {
            "plain": {},
            "same": {"head_learning_rate": 1e-3},
            "other": {"head_learning_rate": 2e-3},
        }.items()
    )
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not any(torch.equal(plain[name], other[name]) for name in plain if is_head(name))


@pytest.mark.slow
def test_the_scoring_has_it_too(tmp_path):
    run = prepare(
        recipe(
            tmp_path,
            method="selected",
            head_learning_rate=0.02,
            steps=2,
            rule="first_order",
            rule_options="head_steps=2",
        )
    )
    assert plan(run).plan.options["head_learning_rate"] == 0.02


@pytest.mark.slow
def test_a_run_that_resumes_ends_as_an_unbroken_one(tmp_path):
    unbroken = trained(tmp_path / "unbroken", head_learning_rate=0.02)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "broken" / name)
    (tmp_path / "broken" / "results.json").unlink()
    resumed = trained(tmp_path / "broken", head_learning_rate=0.02)
    assert json.loads((tmp_path / "broken" / "results.json").read_text())["steps"] == 4
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_without_a_head_it_is_refused_before_anything_is_written(tmp_path, capsys):
    words = ["--model_name_or_path=embedded/smollm2", "--task=reasoning", "--max_train_samples=4", "--max_steps=1"]
    words += [
        "--dataset_name=reasoning_gym/chain_sum",
        "--use_cpu=true",
        "--bf16=false",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert main(["train", *words, "--head_learning_rate=1e-2"]) == 2
    said = capsys.readouterr().err
    assert "head_learning_rate=0.01: reasoning has no new head" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="head_learning_rate is for adapters beside a head, and full trains all"):
        prepare(recipe(tmp_path, method="full", head_learning_rate=0.01))
    with pytest.raises(OptionError, match=r"head_learning_rate=-1\.0 is not allowed"):
        recipe(tmp_path, head_learning_rate=-1)
