"""Scores that are a mean over batches of one number for each site and batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightlora.selection._jackknife import GROUPS, jackknife
from weightlora.selection.rules.base import Scores


def batch_means(seen: Tensor) -> Scores:
    """Return the running means of the rows of ``seen``, with their standard errors over the rows.

    Args:
        seen: One row for each batch, one column for each site, shape (steps, n). A site with zeros only had no
            gradient.

    Example:
        >>> scores = batch_means(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> scores.history, scores.has_gradient, scores.errors
        (((1.0, 0.0), (2.0, 0.0)), (True, False), (1.0, 0.0))
    """
    steps = len(seen)
    groups = min(GROUPS, steps)

    def score(chosen: Sequence[int]) -> Tensor:
        return seen[[step for step in range(steps) if step % groups in chosen]].mean(0)

    known = jackknife(score, groups)
    means = seen.cumsum(0) / torch.arange(1, steps + 1, dtype=seen.dtype)[:, None]
    history = tuple(tuple(row) for row in means.tolist())
    moved = tuple((seen != 0).any(0).tolist())
    return Scores(history, moved, history[-1], errors=known.errors, halves=known.halves)
