"""``time`` alone: all sites in fewer steps. The trainer takes so many, and no batch is read."""

from dataclasses import replace
from pathlib import Path
from unittest import TestCase

import pytest

import weightlora
from weightlora.plan.plan import AdapterPlan
from weightlora.trainer.attach import adopt


class Unread:
    """Rows that must not be read."""

    def __len__(self):
        return 24

    def __getitem__(self, place):
        raise AssertionError("a row was read")


@pytest.fixture
def plan(make_tiny):
    """All four sites, for 0.57 of the steps."""
    return weightlora.select_for(make_tiny("selected"), time=0.57, progress=False)


def adopted(trainer, plan):
    """The lines that are logged while the trainer gets the plan, whatever handlers other tests have left."""
    with TestCase().assertLogs("weightlora.trainer.attach") as log:
        adopt(trainer, plan, seed=0)
    return [record.getMessage() for record in log.records]


def test_the_trainer_takes_the_plans_share_of_its_steps(make_tiny, plan):
    trainer = make_tiny(max_steps=10, logging_steps=1, logging_strategy="steps")
    assert adopted(trainer, plan) == ["the plan trains 5 of 10 steps (max_steps)"]
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 5
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2 * (5 - i) / 5 for i in range(5)])  # the schedule ends with them


def test_epochs_become_steps_as_well(make_tiny, plan):
    """24 rows by two are twelve steps an epoch: 0.57 of 24 are 13."""
    trainer = make_tiny(max_steps=-1, num_train_epochs=2)
    [line] = adopted(trainer, plan)
    assert line == "the plan trains 13 of 24 steps (max_steps); over several epochs store=True did better in our study"
    trainer.train()
    assert trainer.state.global_step == 13


def test_the_share_is_the_decimal_that_was_written(make_tiny):
    """0.29 of 100 steps are 29, though 0.29 · 100 is 28.999999999999996 in floating point."""
    trainer = make_tiny(max_steps=100)
    weightlora.select_for(trainer, time=0.29, progress=False)
    assert trainer.args.max_steps == 29 == int(0.29 * 100) + 1


def test_all_of_the_time_is_plain_lora(make_tiny):
    trainer = make_tiny(max_steps=10)
    plan = weightlora.select_for(trainer, time=1.0, progress=False)
    assert ([*plan.ranks.values()], trainer.args.max_steps) == ([4] * 4, 10)
    assert "of the steps" not in str(plan)


def test_a_whole_plan_leaves_the_steps_alone(make_tiny, plan):
    trainer = make_tiny(max_steps=10)
    with TestCase().assertNoLogs("weightlora.trainer.attach"):
        adopt(trainer, replace(plan, options={}), seed=0)
    assert trainer.args.max_steps == 10


def test_a_second_start_in_the_folder_takes_as_many(make_tiny):
    """The share is taken of the trainer's own number of steps once more, not of 5."""
    for _ in range(2):
        trainer = make_tiny(max_steps=10)
        found = weightlora.select_for(trainer, time=0.57, progress=False)
        assert (found.step_share, trainer.args.max_steps) == (0.57, 5)


@pytest.mark.parametrize(("parameters", "rank", "alpha"), [(None, 4, 8), (0.25, 1, 4)])
def test_all_sites_are_kept_and_no_row_is_read(make_tiny, parameters, rank, alpha):
    """With a quarter of the parameters rank 1 of 4, and alpha·√(1/4)."""
    trainer = make_tiny(rows=Unread(), max_steps=10)
    plan = weightlora.select_for(trainer, time=0.6, parameters=parameters, progress=False)
    assert [(e.r, e.alpha) for e in plan.entries] == [(rank, alpha)] * 4
    assert (plan.rule, plan.spent, trainer.args.max_steps) == ("uniform", {}, 6)
    assert "train     60 % of the steps" in str(plan)
    own, lora = plan.alternatives[:2]
    assert (own.step_time, own.training_time, lora.training_time) == (1.0, 0.6, 1.0)
    assert not [row for row in plan.alternatives if row.name.endswith("of the steps")]  # this plan itself
    assert AdapterPlan.load(Path(trainer.args.output_dir) / "plan.json").step_share == 0.6


@pytest.mark.parametrize("given", [{"rule": "first_order", "steps": 3}, {"adapters": 3}])
def test_with_a_rule_or_another_limit_the_sites_take_the_time(make_tiny, given):
    """Every row is read by the scoring, and the steps are left alone."""
    trainer = make_tiny(max_steps=100)
    plan = weightlora.select_for(trainer, time=0.99, progress=False, **given)
    assert (plan.step_share, trainer.args.max_steps) == (1.0, 100)
    assert plan.spent["scoring_steps"] > 0
    assert 0 < plan.options["step_time"] <= 0.99  # measured; LoRA on all sites takes 1
    assert 1 <= len(plan.names) < 4
    assert "takes as long: better on one task of two" in str(plan)
