"""How long sites are scored: T steps, or until the choice stays the same (``steps="auto"``)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from weightlora.errors import OptionError

if TYPE_CHECKING:
    from weightlora.selection.rules.base import Rule, Scores

Steps = int | Literal["auto"]
"""T, the steps in which sites are scored; ``"auto"`` goes on until the choice stays the same."""
Choice = Mapping[Any, int]
"""The rank of each kept site, by its position or name."""
#: Two choices are the same where their likeness is at least this: four of five sites are in both.
SETTLED = 2 / 3
#: Fewer batches than this say nothing of their noise.
_FEWEST = 6
#: Scoring that takes a larger share of the training's steps is told with what to do.
_CHEAP = 0.05
#: What the default may take of the training's steps; ``"auto"`` may take 30 passes where that is less or not known.
SHARE, _PASSES = 0.03, 30
#: The steps of the default in a training of unknown length, and the most in which it trains a new head before.
_STEPS, HEAD_STEPS = 20, 20


def check_steps(steps: str | int, least: int = 2) -> Steps:
    """Return T as a whole number, or ``"auto"``.

    Raises:
        OptionError: It is neither, or below ``least``.

    Example:
        >>> check_steps("30"), check_steps(30), check_steps("auto")
        (30, 30, 'auto')
    """
    if steps == "auto":
        return "auto"
    if isinstance(steps, bool) or not re.fullmatch(r"-?[0-9]{1,9}", str(steps)):
        raise OptionError(f"steps={steps!r:.80} is not allowed: give a whole number below 10⁹, or 'auto'")
    if int(steps) < least:
        reason = ": with B = 0 the first gradient of ω is zero" if least == 2 else ""
        raise OptionError(f"steps={steps} is not allowed: give at least {least}{reason}")
    return int(steps)


def scoring_steps(total_steps: int | None, least: int = 20) -> int:
    """Return T: 0.5 % of the planned optimizer steps, at least ``least``.

    The paper's 0.5 % is two steps of a usual run, and the first carries no information.

    Args:
        total_steps: The training's, where they are known.
        least: The rule's ``least_steps``.

    Example:
        >>> scoring_steps(410), scoring_steps(10_000), scoring_steps(None, least=30)
        (20, 50, 30)
    """
    return least if total_steps is None else max(least, math.ceil(total_steps / 200))


def scoring_cost(scoring: int, training: int, *, most: bool = False) -> tuple[int, str]:
    """Return what scoring costs as a line for the log, and its level: a warning where it is more than 5 % of the steps.

    Args:
        scoring: Steps in which a new head is trained and sites are scored.
        training: The training's steps.
        most: Scoring may stop before.

    Example:
        >>> scoring_cost(20, 1000)
        (20, 'scoring takes 20 steps, 2 % of the 1000 steps of the training')
        >>> scoring_cost(40, 135)[1][:90]
        'scoring takes 40 steps, 30 % of the 135 steps of the training: it pays back in time only w'
    """
    share = scoring / training
    taken = f"{'at most ' if most else ''}{scoring} steps, {100 * share:.0f} %"
    line = f"scoring takes {taken} of the {training} steps of the training"
    if share <= _CHEAP:
        return logging.INFO, line
    where = f"only where a step of the plan takes less than {1 - share:.2f} of LoRA's" if share < 1 else "in no case"
    return logging.WARNING, (
        f"{line}: it pays back in time {where} (0.87 with half of LoRA's adapters on MiniLM); leave steps and rule "
        "out for at most 3 %, train longer, or give parameters or time alone, for which nothing is scored"
    )


def default_times(total_steps: int | None, *, has_head: bool, spent: int = 0) -> tuple[int, tuple[int, ...]]:
    """Return how many steps a new head is trained, and after how many further steps the scores are looked at.

    Where the training's steps are known these are at most 3 % of them, a new head taking up to half; scoring stops
    before where the choice is settled. No times: fewer than two steps are left for scoring.

    Args:
        total_steps: The training's.
        has_head: Whether a head is trained, too.
        spent: Steps that measuring takes of the 3 %.

    Example:
        >>> default_times(None, has_head=True), default_times(1_000, has_head=False)
        ((20, (20,)), (0, (7, 15, 30)))
        >>> default_times(250, has_head=True), default_times(20, has_head=False)
        ((3, (4,)), (0, ()))
    """
    if total_steps is None:
        return (HEAD_STEPS if has_head else 0), (_STEPS,)
    most = int(SHARE * total_steps) - spent
    head = min(HEAD_STEPS, most // 2) if has_head else 0
    left = most - head
    if left < 2 or (has_head and head < 1):  # scores of one batch have no standard error
        return 0, ()
    times = [left]
    while times[0] >= 2 * _FEWEST:
        times.insert(0, times[0] // 2)
    return head, tuple(times)


def reading_times(steps: Steps, rule: Rule, total_steps: int | None = None) -> tuple[int, ...]:
    """Return after how many steps the scores are looked at; the last number is the most that are taken.

    With ``"auto"`` the model runs on at most 30 batches, or 3 % of the training's steps where that is more. Each number
    is twice the one before. There are as many as leave half of these passes or more to the steps.

    Args:
        steps: T, which is then the only number, or ``"auto"``.
        rule: Says how many passes it takes to look at the scores.
        total_steps: The training's.

    Example:
        >>> from weightlora.selection.rules import rule_of
        >>> reading_times(20, rule_of("first_order")), reading_times("auto", rule_of("first_order"))
        ((20,), (7, 15, 30))
        >>> reading_times("auto", rule_of("integrated"))  # 12 passes to read the scores
        (18,)
        >>> reading_times("auto", rule_of("integrated"), total_steps=10_000)
        (7, 14, 28, 57, 114, 228)
    """
    if steps != "auto":
        return (steps,)
    passes = _PASSES if total_steps is None else max(_PASSES, int(SHARE * total_steps))
    times: tuple[int, ...] = (_FEWEST,)  # also where a single look takes more than that
    each = max(1, rule.passes((2,)) - rule.passes((1,)))  # of a step
    for count in range(1, passes):
        reading = rule.passes(range(1, count + 1)) - each * count
        halved = tuple((passes - reading) // each >> k for k in reversed(range(count)))
        if halved[0] < _FEWEST or (count > 1 and 2 * each * halved[-1] < passes):
            break
        times = halved
    return times


def settled(found: Generator[tuple[int, Scores]], choose: Callable[[Scores], Sequence[Choice]]) -> tuple[int, Scores]:
    """Return the first scores whose choice is that of the scores before and of both halves, or the last ones.

    Args:
        found: T and the scores after T steps, at least once.
        choose: The choice by scores, and those by either half of their batches where there are halves.
    """
    before: Choice | None = None
    last: tuple[int, Scores] | None = None
    with closing(found):
        for last in found:
            choice, *halves = choose(last[1])
            same = before is not None and likeness(before, choice) >= SETTLED
            if same and (not halves or likeness(*halves) >= SETTLED):
                break
            before = choice
    assert last is not None, "a rule yields scores at least once"
    return last


def likeness(a: Choice, b: Choice) -> float:
    """Return Jaccard's index of two choices: the ranks in both ÷ the ranks in any of them.

    Example:
        >>> likeness({0: 1, 1: 1, 2: 1}, {1: 1, 2: 1, 3: 1}), likeness({0: 3}, {0: 2})
        (0.5, 0.6666666666666666)
    """
    sites = {*a, *b}
    both = sum(min(a.get(site, 0), b.get(site, 0)) for site in sites)
    either = sum(max(a.get(site, 0), b.get(site, 0)) for site in sites)
    return both / either if either else 1.0
