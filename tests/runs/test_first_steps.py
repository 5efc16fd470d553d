"""``weightlora train`` with the paper's methods, whose T steps are the first of the run, and with a store."""

import json

import pytest
from small_run import adapter, same, words, write_base

from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan

PAPER = {"method": "weightlora", "rule": None, "rule_options": None, "steps": 2, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("method", ["weightlora", "weightlora_plus"])
def test_the_run_has_as_many_steps_as_any_and_goes_on_from_the_first_checkpoint(base, tmp_path, method):
    assert main(words(base, tmp_path / "run", **{**PAPER, "method": method})) == 0
    plan = AdapterPlan.load(tmp_path / "run" / "plan.json")
    assert (plan.rule, plan.options["steps"], plan.options["begins_training"]) == ("paper", 2, True)
    assert plan.spent == {"scoring_steps": 0, "total_steps": 6}
    found = results(tmp_path / "run")
    assert (found["steps"], found["adapters"], [step for step, _ in found["losses"]]) == (6, 5, [3, 4, 5, 6])
    assert (tmp_path / "run" / "checkpoint-2" / "plan.json").exists()


def test_a_killed_run_ends_as_one_that_was_not(base, tmp_path):
    assert main(words(base, tmp_path / "whole", **PAPER)) == 0
    assert main(words(base, tmp_path / "run", **PAPER)) == 0
    for name in ("results.json", "adapter", "checkpoint-4", "checkpoint-6"):  # as after a kill before step 4
        path = tmp_path / "run" / name
        path.rename(tmp_path / f"gone-{name}")
    assert main(words(base, tmp_path / "run", **PAPER)) == 0
    assert same(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"eval_on_start": True}, "eval_on_start"),
        ({"grow_batch": True}, "grow_batch"),
        ({"head_learning_rate": 1e-2}, "head"),
    ],
)
def test_what_does_not_go_with_first_steps_is_one_line(base, tmp_path, capsys, changed, name):
    assert main(words(base, tmp_path / "run", **PAPER, **changed)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert name in line
    assert "takes the first steps" in line


def test_t_that_leaves_no_step_and_another_rule_are_one_line(base, tmp_path, capsys):
    assert main(words(base, tmp_path / "run", **{**PAPER, "steps": 6})) == 2
    assert "steps=6 leaves none of the 6 steps" in capsys.readouterr().err
    assert main(words(base, tmp_path / "run", **{**PAPER, "rule": "first_order"})) == 2
    assert "method weightlora is the paper's; give method selected" in capsys.readouterr().err


UPPER = {"method": "lora", "adapters": None, "rule": None, "rule_options": None, "steps": None, "lora_dropout": 0.0}
UPPER |= {"max_steps": None, "num_train_epochs": 3, "save_steps": 8, "logging_steps": 4}
LAYERS = ["--lora_target_modules", "layer.1.attention.self.query", "layer.1.attention.self.value"]


def test_a_plan_of_a_run_with_a_store_is_made_for_its_epochs(base, tmp_path):
    selected = {**UPPER, "method": "selected", "adapters": 1, "rule": "kappa_tune", "store_dropout": "off below"}
    assert main(words(base, tmp_path / "run", *LAYERS, store_frozen="memory", **selected)) == 0
    assert AdapterPlan.load(tmp_path / "run" / "plan.json").options["epochs"] == 3.0


@pytest.mark.slow
def test_a_store_gives_the_adapter_of_a_run_without_dropout_below(base, tmp_path, capsys):
    assert main(words(base, tmp_path / "run", *LAYERS, store_frozen="memory", **UPPER)) == 2
    assert "dropout='off below'" in capsys.readouterr().err
    stored = {"store_dropout": "off below", **UPPER}
    assert main(words(base, tmp_path / "run", *LAYERS, store_frozen="memory", **stored)) == 0
    files = tmp_path / "states"
    assert main(words(base, tmp_path / "files", *LAYERS, store_frozen=files, **stored)) == 0
    assert main(words(base, tmp_path / "again", *LAYERS, store_frozen=files, **stored)) == 0
    first = adapter(tmp_path / "run")
    for folder in ("files", "again"):
        other = adapter(tmp_path / folder)
        assert all(other[name].allclose(value, atol=1e-4) for name, value in first.items())


def test_options_of_a_store_need_one(base, tmp_path, capsys):
    assert main(words(base, tmp_path / "run", store_limit="1GB")) == 2
    assert "store_limit='1GB' needs store_frozen" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_while_its_store_is_filled_ends_with_the_same_bytes(base, tmp_path):
    """After five of the first epoch's eight steps: ten rows are stored, and the last checkpoint is that of step 4."""
    stored = {**UPPER, "store_dropout": "off below", "save_steps": 4}
    for name in ("whole", "run"):
        assert main(words(base, tmp_path / name, *LAYERS, store_frozen=tmp_path / f"{name}-states", **stored)) == 0
    for name in ("results.json", "adapter", *(f"checkpoint-{step}" for step in range(8, 28, 4))):
        (tmp_path / "run" / name).rename(tmp_path / f"gone-{name}")
    assert (tmp_path / "run" / "checkpoint-4").exists()
    index = tmp_path / "run-states" / "process-0" / "hidden.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16
    index.write_bytes(b"".join(lines[:10]))
    assert main(words(base, tmp_path / "run", *LAYERS, store_frozen=tmp_path / "run-states", **stored)) == 0
    assert same(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))
    assert len(index.read_bytes().splitlines()) == 16
