"""``train --plan``: the plan's options are those of the run, and another value of one is a mistake of one line."""

import shutil

import pytest
import yaml
from small_run import adapter, same, words

from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan

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


def test_a_plan_in_the_folder_that_was_made_for_something_else_is_named_and_nothing_is_recorded(
    base, whole, tmp_path, capsys
):
    """As ``select`` or a run that was killed leaves it."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "plan.json", run)
    assert main(words(base, run, lora_r=16)) == 2
    assert "r=8 there, 16 now" in capsys.readouterr().err
    assert not (run / "config.yaml").exists()
    assert main(words(base, run)) == 0  # the control: the same question
    assert same(adapter(run), adapter(whole))
    assert AdapterPlan.load(run / "plan.json") == AdapterPlan.load(whole / "plan.json")
