"""How a selection spends its steps, which sites the scores keep, whether they say anything, and what a plan records."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.cost.stored_run import RunBudget
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.model.distributed import is_first
from weightlora.plan.budget import Chooser, chosen_ranks
from weightlora.selection._measured import measuring_steps
from weightlora.selection.rules import rule_of, settings_of
from weightlora.selection.steps import HEAD_STEPS, default_times, reading_times, scoring_cost, scoring_steps

if TYPE_CHECKING:
    from weightlora.selection.allocate import Costs
    from weightlora.selection.rules.base import Rule, Scores
    from weightlora.selection.scoring import Scoring

_LOG = logging.getLogger(__name__)
#: With fewer sites the agreement of two halves says nothing.
_FEW = 10
#: Warnings name the line that called ``select()``: it is so many frames above.
_CALLER = 4


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
    """Return how the steps of a selection are spent; where the training is too short for scoring, sites are random."""
    rule = scoring.scored_by
    assert rule is not None, "something is scored"
    rounds, measuring = measuring_steps(scoring)
    if scoring.rule is None and scoring.steps is None:
        head_steps, times = default_times(scoring.total_steps, has_head=has_head, spent=measuring)
        if times:
            return Course(rule, head_steps, times, rounds, measuring)
        if scoring.frees_steps:
            return Course(rule, 0, (1,), rounds, measuring)  # floors are told apart by sums over many sites
        return Course(rule_of("stratified"), 0, (0,), rounds, measuring)
    steps = scoring_steps(scoring.total_steps, rule.least_steps) if scoring.steps is None else scoring.steps
    return Course(rule, _head_steps(rule, has_head), reading_times(steps, rule, scoring.total_steps), rounds, measuring)


def warn_of_chance(scoring: Scoring, course: Course) -> None:
    """Warn where the training is too short for any scoring."""
    if scoring.rule is None and course.rule.name == "stratified":
        warnings.warn(
            f"{scoring.total_steps} steps leave none for scoring within 3 % of them: sites are taken at random, of "
            "every projection alike; train longer, give steps, or give parameters or time alone, for which nothing is "
            "scored",
            WeightLoraWarning,
            stacklevel=_CALLER,
        )


def tell_cost(scoring: Scoring, steps: int, *, most: bool) -> int:
    """Log what scoring will cost, where the training's steps are known and are not these; return the level."""
    if not (steps and scoring.total_steps) or scoring.run is not None or scoring.frees_steps:
        return logging.INFO  # also where the time that was asked for includes the selection
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


def measured_by(costs: Costs, ranks: Sequence[int], peak: int, share: float = 1.0) -> dict[str, Any]:
    """Return what a plan records of its step time and its peak, and of LoRA's peak, where they were measured.

    Args:
        costs: Time and memory, where they are limited.
        ranks: Of the sites.
        peak: Counted for them, in bytes.
        share: Of the training's steps.
    """
    kept = [i for i, r in enumerate(ranks) if r]
    found: dict[str, Any] = {}
    if costs.time is not None:
        found["step_time"] = (costs.time.of(kept) + costs.growth(costs.time, ranks)) / costs.time.of_all
    if costs.time is not None and costs.run is not None:
        run, lora = costs.run, costs.time.of_all
        found["run_time"] = (run.time(kept, share) + costs.growth(run.cost, ranks)) / lora
        found["floor_times"] = [round(time / lora, 3) for time in run.of_floors()]
    if costs.memory is not None:
        found |= {"peak_bytes": peak, "lora_peak_bytes": costs.memory.of_all}
    if costs.micro_batch is not None:
        found |= {"lora_rows": costs.micro_batch.rows, "lora_rows_peak_bytes": costs.micro_batch.peak}
    return found


def steps_by(chooser: Chooser, scores: Scores, ranks: Sequence[int]) -> tuple[float, dict[str, Any]]:
    """Return the share of the training's steps, and what a plan records of it, where steps compete with floors."""
    if not isinstance(chooser, RunBudget):
        return 1.0, {}
    share = math.floor(1000 * chooser.run.step_share([i for i, r in enumerate(ranks) if r], chooser.limit)) / 1000
    share = max(share, 0.001)
    gains = {"floor_gains": [round(gain, 3) for gain in chooser.gains(scores.sizes)]}
    return share, gains | ({} if share == 1 else {"step_share": share})


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


# -- what the scores keep ----------------------------------------------------------------------------------------------


def require_gradients(names: Sequence[str], scores: Scores) -> None:
    """Raise where no site had a gradient in the whole scoring; warn where some had none."""
    without = [name for name, found in zip(names, scores.has_gradient, strict=True) if not found]
    if len(without) == len(names):
        raise SelectionError(
            f"no site had a gradient in {len(scores.history)} scoring steps, so their scores say nothing; does the "
            "loss depend on the adapted layers?"
        )
    if without:
        warnings.warn(
            f"{len(without)} of {len(names)} sites had no gradient in the scoring, {without[0]} among them: the loss "
            "does not depend on them; leave them out of target_modules",
            WeightLoraWarning,
            stacklevel=_CALLER,
        )


def agreement_of(halves: tuple[Sequence[float], Sequence[float]]) -> float:
    """Return the rank correlation of the scores of the two halves of the batches; warn where it may be chance."""
    found = rank_correlation(*halves)
    # Of two rankings of n sites at random it has the mean 0 and the standard deviation 1/√(n−1).
    if len(halves[0]) >= _FEW and found < 2 / (len(halves[0]) - 1) ** 0.5:
        warnings.warn(
            f"these scores cannot tell the sites apart: two halves of the batches rank them with a correlation of "
            f"{found:.2f}; more steps, or a random choice, would serve as well",
            WeightLoraWarning,
            stacklevel=_CALLER + 1,  # found_by() is between
        )
    return found


def choices(budget: Chooser, scores: Scores) -> list[dict[int, int]]:
    """Return what the scores would keep, and what either half of the batches would where they read halves."""
    if scores.ranks:
        return [{i: r for i, r in enumerate(chosen_ranks(budget, scores.ranks)) if r}]
    return [dict.fromkeys(budget.choose(sizes), 1) for sizes in (scores.sizes, *(scores.halves or ()))]


def kept_numbers(scores: Scores, ranks: Sequence[int]) -> dict[int, tuple[int, ...] | None]:
    """Return which of its ranks each kept site keeps, the best ones; None where the site is kept whole."""
    if not scores.ranks:
        return {i: None for i, r in enumerate(ranks) if r}
    best = (sorted(range(len(own)), key=lambda k: -own[k]) for own in scores.ranks)
    return {i: tuple(sorted(order[:r])) for i, (r, order) in enumerate(zip(ranks, best, strict=True)) if r}


def require_positive(scores: Scores, rule: Rule, budget: Chooser) -> None:
    """Raise where no site that fits has a positive score (the paper's phase 2: ω > 0); warn where fewer have one.

    Raises:
        SelectionError: None of them has a positive score.
    """
    wanted = budget.choose(scores.sizes)
    positive = {i for i, score in enumerate(scores.final) if score > 0}
    kept = [i for i in wanted if i in positive]
    advice = f"; lower {' or '.join(rule.knobs)}" if rule.knobs else ""
    if not kept:
        raise SelectionError(f"none of the {len(wanted)} wanted sites has a positive score{advice}")
    # A small site without a positive score may fill what a larger one left of the budget: then there is no warning.
    if len(kept) < len(wanted) and positive <= set(kept):
        text = f"only {len(kept)} of the {len(wanted)} wanted sites have a positive score, and no others are kept"
        warnings.warn(f"{text}{advice}", WeightLoraWarning, stacklevel=_CALLER + 1)  # _scored_ranks() is between


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank, and a constant list has correlation 0.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]), 6)
        0.5
    """
    ranks = torch.stack([_ranks(a), _ranks(b)])
    centred = ranks - ranks.mean(1, keepdim=True)
    size = centred.norm(dim=1).prod()
    return float(centred.prod(0).sum() / size) if size > 0 else 0.0


def _ranks(values: Sequence[float]) -> Tensor:
    numbers = torch.tensor(values, dtype=torch.float64)
    below = (numbers[None] < numbers[:, None]).sum(1)
    equal = (numbers[None] == numbers[:, None]).sum(1)
    return below + (equal - 1).double() / 2
