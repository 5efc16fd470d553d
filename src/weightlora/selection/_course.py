"""How a selection spends its steps, and what a plan records of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.distributed import is_first
from weightlora.selection._kept import agreement_of
from weightlora.selection._measured import measuring_steps
from weightlora.selection.rules import rule_of, settings_of
from weightlora.selection.steps import HEAD_STEPS, default_times, reading_times, scoring_cost, scoring_steps

if TYPE_CHECKING:
    from weightlora.selection.allocate import Costs
    from weightlora.selection.rules.base import Rule, Scores
    from weightlora.selection.scoring import Scoring

#: The line that called ``select()`` is so many frames above.
_CALLER = 4
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """The rule, and how many steps it and all measuring take."""

    rule: Rule
    head_steps: int
    times: tuple[int, ...]
    """After how many steps the scores are looked at."""
    rounds: int
    """Of the measurement of step times."""
    measuring: int
    """Steps that measuring takes."""

    @property
    def steps(self) -> int:
        """The most steps that the selection takes."""
        return self.head_steps + self.rule.batches(self.times) + self.measuring


def course_of(scoring: Scoring, has_head: bool) -> Course:
    """Return how the steps of a selection are spent.

    Warns:
        WeightLoraWarning: The training is too short for any scoring.
    """
    rule = scoring.scored_by
    assert rule is not None, "something is scored"
    rounds, measuring = measuring_steps(scoring)
    if scoring.rule is None and scoring.steps is None:
        head_steps, times = default_times(scoring.total_steps, has_head=has_head, spent=measuring)
        if times:
            return Course(rule, head_steps, times, rounds, measuring)
        warnings.warn(
            f"{scoring.total_steps} steps leave none for scoring within 3 % of them: sites are taken at random, of "
            "every projection alike; train longer, give steps, or give parameters or time alone, for which nothing is "
            "scored",
            WeightLoraWarning,
            stacklevel=_CALLER,
        )
        return Course(rule_of("stratified"), 0, (0,), rounds, measuring)
    steps = scoring_steps(scoring.total_steps, rule.least_steps) if scoring.steps is None else scoring.steps
    return Course(rule, _head_steps(rule, has_head), reading_times(steps, rule, scoring.total_steps), rounds, measuring)


def tell_cost(scoring: Scoring, steps: int, *, most: bool) -> int:
    """Log what scoring will cost, where the training's steps are known and are not these; return the level."""
    if not (steps and scoring.total_steps) or scoring.run is not None:
        return logging.INFO
    level, line = scoring_cost(steps, scoring.total_steps, most=most)
    if is_first():
        _LOG.log(level, line)
    return level


def options_of(scoring: Scoring, course: Course) -> dict[str, Any]:
    """Return the settings that a plan records; those that are off by default are left out."""
    return {
        **scoring.limits.asked,
        **stored_by(scoring),
        "steps": "auto" if scoring.steps == "auto" else course.times[-1],
        **({"learning_rate": scoring.learning_rate} if scoring.run is None else {}),
        **settings_of(course.rule),
        "head_steps": course.head_steps,
        **({} if scoring.head_learning_rate is None else {"head_learning_rate": scoring.head_learning_rate}),
        **({} if scoring.ranked_by == "score" else {"ranking": scoring.ranked_by}),
        **({} if scoring.fast is None else {"fast": scoring.fast}),
        **({"warm_start": True} if scoring.warm_start else {}),
        **({} if scoring.run is None else {"begins_training": True}),
    }


def stored_by(scoring: Scoring) -> dict[str, float]:
    """Return the epochs of a training that stores what is frozen."""
    return {} if scoring.epochs is None else {"epochs": scoring.epochs}


def found_by(scored: int, scores: Scores, course: Course) -> dict[str, Any]:
    """Return what a plan records of the scoring besides the scores."""
    found: dict[str, Any] = {"scored": scored} if len(course.times) > 1 else {}
    return found | ({} if scores.halves is None else {"agreement": agreement_of(scores.halves)})


def measured_by(costs: Costs, ranks: Sequence[int], peak: int) -> dict[str, Any]:
    """Return what a plan records of its step time and its peak, and of LoRA's peak, where they were measured."""
    kept = [i for i, r in enumerate(ranks) if r]
    found: dict[str, Any] = {}
    if costs.time is not None:
        found["step_time"] = (costs.time.of(kept) + costs.growth(costs.time, ranks)) / costs.time.of_all
    if costs.time is not None and costs.run is not None:
        run, lora = costs.run, costs.time.of_all
        found["run_time"] = (run.cost.of(kept) + costs.growth(run.cost, ranks)) / lora
        found["floor_times"] = [round(time / lora, 3) for time in run.of_floors()]
    if costs.memory is not None:
        found |= {"peak_bytes": peak, "lora_peak_bytes": costs.memory.of_all}
    return found


def spent_on(scoring: Scoring, course: Course, scored: int) -> dict[str, int]:
    """Return the steps that the selection took, and those of the training; ``scored`` is 0 where nothing was scored."""
    times = [t for t in course.times if t <= scored]
    steps = (course.head_steps + course.rule.batches(times) if times else 0) + course.measuring
    steps = 0 if scoring.run is not None else steps  # they are steps of the training
    return {"scoring_steps": steps} | ({} if scoring.total_steps is None else {"total_steps": scoring.total_steps})


def _head_steps(rule: Rule, has_head: bool) -> int:
    if rule.head_steps and not has_head:
        raise OptionError(f"head_steps={rule.head_steps}, but PEFT trains no module whole; name it in modules_to_save")
    return (HEAD_STEPS if has_head else 0) if rule.head_steps is None else rule.head_steps
