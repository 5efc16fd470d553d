"""Which sites their scores keep, and whether these scores say anything."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from weightlora.errors import SelectionError, WeightLoraWarning
from weightlora.plan.budget import Chooser, chosen_ranks
from weightlora.selection.rules.base import Rule, Scores

#: With fewer sites the agreement of two halves says nothing.
_FEW = 10
#: Warnings name the line that called ``select()``: it is so many frames above.
_CALLER = 4


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
