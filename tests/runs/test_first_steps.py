"""Where ``weightlora train`` begins: with the paper's T steps, which are the first of the run, a store, or a plan."""

import json
from dataclasses import replace

import pytest
import yaml
from small_run import adapter, same, words

from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan

PAPER = {"method": "weightlora", "rule": None, "rule_options": None, "steps": 2, "lora_dropout": 0.0}


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


# -- ``--plan``: the plan's options are those of the run, and another value of one is a mistake of one line ----------

OF_PLAN = ("adapters", "steps", "rule_options", "lora_dropout")


@pytest.fixture(scope="module")
def plan(whole):
    return whole / "plan.json"


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.slow
def test_the_recipe_of_the_plan_may_stay_and_what_is_left_out_is_the_plans(base, whole, plan, tmp_path):
    assert main(words(base, tmp_path / "same", plan=plan)) == 0
    assert main(words(base, tmp_path / "none", plan=plan, **dict.fromkeys(OF_PLAN))) == 0
    assert same(adapter(tmp_path / "same"), adapter(whole))
    assert same(adapter(tmp_path / "none"), adapter(whole))
    for folder in (tmp_path / "same", tmp_path / "none"):
        found = {name: config(folder)[name] for name in (*OF_PLAN, "lora_r", "rule", "ranking", "method")}
        assert found == {
            "adapters": "5",
            "steps": "2",
            "rule_options": ["head_steps=0"],
            "lora_dropout": 0.2,
            "lora_r": 8,
            "rule": "first_order",
            "ranking": "spread",
            "method": "selected",
        }
        assert main(["train", "--config", str(folder / "config.yaml")]) == 0  # the same run, which is done


@pytest.mark.slow
def test_a_plan_of_other_values_is_recorded_with_them(base, plan, tmp_path):
    assert (
        main(["select", *words(base, tmp_path / "s", lora_r=4, lora_alpha=32, use_rslora=True, rule="integrated")[1:]])
        == 0
    )
    none = dict.fromkeys((*OF_PLAN, "rule", "save_steps"))
    assert main(words(base, tmp_path / "t", plan=tmp_path / "s" / "plan.json", max_steps=1, **none)) == 0
    found = {name: config(tmp_path / "t")[name] for name in ("lora_r", "lora_alpha", "use_rslora", "rule", "use_dora")}
    assert found == {"lora_r": 4, "lora_alpha": 32, "use_rslora": True, "rule": "integrated", "use_dora": False}
    assert plan.exists()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"lora_r": 16}, "lora_r=8 there, 16 now"),
        ({"lora_alpha": 8}, "lora_alpha=16 there, 8 now"),
        ({"lora_dropout": 0.3}, "lora_dropout=0.2 there, 0.3 now"),
        ({"use_dora": True}, "use_dora=False there, True now"),
        ({"use_rslora": True}, "use_rslora=False there, True now"),
        ({"lora_modules_to_save": "pooler"}, "lora_modules_to_save=[] there, ['pooler'] now"),
        ({"lora_target_modules": "query"}, "lora_target_modules=['query'] are not the candidates of"),
        ({"adapters": 3}, "adapters=5 there, 3 now"),
        ({"adapters": 0.5}, "adapters=5 there, 0.5 now"),
        ({"rule": "integrated"}, "rule='first_order' there, 'integrated' now"),
        ({"rule_options": "head_steps=1"}, "head_steps=0 there, 1 now"),
        ({"ranking": "score"}, "ranking='spread' there, 'score' now"),
        ({"steps": 3}, "steps=2 there, 3 now"),
        ({"method": "random"}, "method='selected' there, 'random' now"),
        ({"method": "weightlora_plus"}, "method='selected' there, 'weightlora_plus' now"),
        ({"method_options": "warm_start=true"}, "warm_start=False there, True now"),
        ({"method_options": "learning_rate=1.0"}, "learning_rate=0.01 there, 1.0 now"),
        ({"method_options": "tinit=3"}, "tinit=None there, 3 now"),
    ],
)
def test_an_option_that_the_plan_decides_otherwise_is_refused(base, plan, tmp_path, capsys, changed, text):
    assert main(words(base, tmp_path / "run", plan=plan, **changed)) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert "leave plan out to select anew" in printed
    assert len([line for line in printed.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "run").exists()


def test_a_plan_that_is_made_is_not_selected(base, plan, tmp_path, capsys):
    assert main(["select", *words(base, tmp_path / "run", plan=plan)[1:]]) == 2
    assert "is made already and weightlora select makes a new one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_acts_on_the_training_of_a_plan_is_accepted(base, plan, whole, tmp_path):
    assert main(words(base, tmp_path, plan=plan, head_learning_rate=1e-4, fast="rank")) == 0
    assert config(tmp_path)["head_learning_rate"] == 1e-4
    assert not same(adapter(tmp_path), adapter(whole))


def test_a_plan_that_a_killed_run_left_is_replaced_where_the_options_are_others(base, whole, tmp_path, capsys):
    """It was killed before its first checkpoint; the paper's methods write one with the plan."""
    run = tmp_path / "run"
    run.mkdir()
    plan = AdapterPlan.load(whole / "plan.json")
    replace(plan, question={**plan.question, "lora": {**plan.question["lora"], "r": 16}}).save(run / "plan.json")
    assert main(words(base, run)) == 0
    assert "r=16 there, 8 now" in capsys.readouterr().out
    assert same(adapter(run), adapter(whole))
    assert AdapterPlan.load(run / "plan.json") == AdapterPlan.load(whole / "plan.json")
