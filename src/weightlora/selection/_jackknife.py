"""How sure scores are: the delete-a-group jackknife over batches, and how far two halves agree on the ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Groups of batches, at most; each costs as much memory as the gradients that a rule sums.
GROUPS = 8


@dataclass(frozen=True)
class Estimate:
    """Scores, their standard errors, and the scores of either half of the batches."""

    scores: tuple[float, ...]
    errors: tuple[float, ...]
    halves: tuple[tuple[float, ...], tuple[float, ...]]


def jackknife(score: Callable[[Sequence[int]], Tensor], groups: int) -> Estimate:
    """Return the scores of all groups with their standard errors.

    The standard error is √((g−1)/g · Σᵢ (sᵢ − s̄)²), where sᵢ is the score without group i (Efron and Stein 1981). For
    a mean over groups of one size this is the usual standard error of a mean.

    Args:
        score: ``score(chosen)``: the scores of all sites, by the batches of the chosen groups.
        groups: How many there are, at least 2.

    Example:
        >>> batches = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> jackknife(lambda chosen: batches[list(chosen)].mean(0), 2)
        Estimate(scores=(2.0, 5.0), errors=(1.0, 0.0), halves=((1.0, 5.0), (3.0, 5.0)))
    """
    whole = score(range(groups))
    without = torch.stack([score([i for i in range(groups) if i != left]) for left in range(groups)])
    errors = ((without - without.mean(0)).square().sum(0) * (groups - 1) / groups).sqrt()
    halves = score(range(0, groups, 2)), score(range(1, groups, 2))
    return Estimate(_numbers(whole), _numbers(errors), (_numbers(halves[0]), _numbers(halves[1])))


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


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())
