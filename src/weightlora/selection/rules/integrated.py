"""The rule ``integrated``: each adapter's share of the loss that plain LoRA really saves after a few steps."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from weightlora.model.distributed import copy_from_first
from weightlora.model.gates import gated
from weightlora.model.restore import evaluated
from weightlora.plan.budget import whole_budget
from weightlora.selection.rules.base import Rule, batch_means, require
from weightlora.selection.stage import let_train, train_adapters

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.rules.base import Scores
    from weightlora.selection.stage import Stage

Per = Literal["site", "rank"]


@dataclass(frozen=True)
class Integrated(Rule):
    """Train LoRA on all sites for T steps, then score site i by −∫₀¹ ∂L/∂ω_i dω, all gates being scaled together.

    This is the Aumann–Shapley value (1974) of the adapter in the game "loss that all adapters save together"; for
    features of an input it is known as integrated gradients (arXiv:1703.01365). The scores sum to the loss saved on the
    batches that they are read from. Those are further batches, which the adapters were not trained on. The integral is
    taken by Gauss–Legendre quadrature, and dropout is off.

    With ``per="rank"`` the trained B·A of each site is rotated to its singular vectors, and every rank has a gate. The
    scores of a site's ranks add up to the site's. The budget is then spent rank by rank, by score per parameter: a site
    may keep any rank from 0 to r, at the same alpha/r.

    LoRA on all sites wants a lower learning rate than the few sites that are kept: at the training's own it can
    diverge, and the scores then tell what diverged. So adapters, but not a head, are trained at √(K/n) times that rate
    where the budget holds K of n sites, counted in the order of their names.

    Args:
        per: ``"site"`` keeps or drops whole adapters, ``"rank"`` single ranks.
        most_ranks: With ``per="rank"``, a site keeps at most so many ranks; None: any number up to r. ``"even"``: at
            most the budget's share of its r ranks, rounded up. At a tenth of rank 10 these are one rank on each site.
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Integrated(per="rank")
        Integrated(head_steps=None, per='rank', most_ranks=None)
    """

    per: Per = "site"
    most_ranks: int | Literal["even"] | None = None
    trains_adapters: ClassVar[bool] = True
    least_steps: ClassVar[int] = 30
    # docs/lab/choice.md: two nodes and fewer steps are worse on reviews; other probes were not tried.
    nodes: ClassVar[int] = 3
    """Points of the quadrature, each one forward and backward pass."""
    probes: ClassVar[int] = 4
    """Further batches that the scores are read from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.per in get_args(Per), f"per={self.per!r}", f"one of {', '.join(get_args(Per))}")
        most, known = self.most_ranks, self.most_ranks in (None, "even")
        whole = isinstance(most, int) and not isinstance(most, bool) and most >= 1
        require(known or whole, f"most_ranks={most!r}", "1 or more ranks, or 'even'")
        require(most is None or self.per == "rank", f"most_ranks with per={self.per!r}", "per='rank'")

    @property
    def scores_ranks(self) -> bool:
        """With ``per="rank"``."""
        return self.per == "rank"

    def batches(self, steps: Sequence[int]) -> int:
        """T batches to train on, and those that the scores are read from."""
        return steps[-1] + len(steps) * self.probes

    def passes(self, steps: Sequence[int]) -> int:
        """One for each batch to train on, and one for each node on the others."""
        return steps[-1] + len(steps) * self.probes * self.nodes

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the scores; the history has a row for each batch that they are read from.

        Raises:
            OptionError: The budget cannot be spent on single ranks.
        """
        most = self.most(stage, budget)  # a mistake is found before anything is trained
        history: list[tuple[float, ...]] = []
        for start, end in pairwise((0, *steps)):
            scale = self.rate_scale(budget, stage, len(stage.layers))
            train_adapters(stage, steps=end - start, learning_rate=stage.learning_rate, scale=scale)
            scores = self.read(stage, most)
            history += scores.history
            yield end, replace(scores, history=tuple(history))

    def rate_scale(self, budget: Chooser, stage: Stage, trained: int) -> float:
        """Return the factor of the learning rate while so many sites are trained."""
        # docs/lab/choice.md: on sums the training's own rate loses 0.07, elsewhere the two differ little.
        kept = len(budget.choose((1.0,) * len(stage.layers)))  # nothing is scored yet: sites of equal score
        return math.sqrt(min(1.0, kept / trained))

    def most(self, stage: Stage, budget: Chooser) -> list[int]:
        """Return how many ranks each site may keep; none where sites are kept whole.

        Raises:
            OptionError: The budget cannot be spent on single ranks.
        """
        if self.per == "site":
            return []
        whole = whole_budget(budget)
        all_ranks = [b.shape[1] for b in stage.parameters("lora_B")]
        if self.most_ranks == "even":
            total = sum(whole.costs)
            return [math.ceil(Fraction(r * min(whole.limit, total), total)) for r in all_ranks]
        return [r if self.most_ranks is None else min(self.most_ranks, r) for r in all_ranks]

    def read(self, stage: Stage, most: Sequence[int]) -> Scores:
        """Return the scores of the adapters as they are; of single ranks, 0 for those that are more than ``most``."""
        if most:
            _rotate(stage)
        saved = self._saved(stage)
        scores = batch_means(torch.stack([own.sum(1) for own in saved], dim=1))
        return replace(scores, ranks=tuple(map(_best, saved, most)))

    def _saved(self, stage: Stage) -> list[Tensor]:
        """−∫₀¹ ∂L/∂ω dω of every rank of every site for each of the next batches: (probes, r) for a site."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        seen = [torch.zeros(self.probes, b.shape[1], dtype=torch.float64) for b in matrices]
        with evaluated(stage.model), gated(stage.layers) as gates:
            for place, batch in enumerate(stage.take(self.probes)):
                for node, weight in gauss_legendre(self.nodes):
                    gates.write(torch.full((len(matrices),), node))
                    stage.backward("scoring", place + 1, matrices, batch)
                    for b, own in zip(matrices, seen, strict=True):
                        if b.grad is not None:  # a gate's gradient is ⟨B, ∂L/∂B⟩/ω, and a rank's part of it a column's
                            own[place] -= weight / node * (b.detach().double() * b.grad).sum(0).cpu()
                            b.grad = None
        return seen


@torch.no_grad()
def _rotate(stage: Stage) -> None:
    """Turn A and B of each site so that the ranks are B·A's singular vectors; the product stays as it is."""
    pairs = list(zip(stage.parameters("lora_A"), stage.parameters("lora_B"), strict=True))
    for a, b in pairs:
        left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().t())
        u, sizes, vh = torch.linalg.svd(left.R @ right.R.t())
        b.copy_(left.Q @ u * sizes)
        a.copy_(vh @ right.Q.t())
    copy_from_first([matrix for pair in pairs for matrix in pair])


def gauss_legendre(nodes: int) -> list[tuple[float, float]]:
    """Return the points and weights of the quadrature of [0, 1] that is exact for polynomials of degree 2·nodes − 1.

    Example:
        >>> gauss_legendre(1)
        [(0.5, 1.0)]
        >>> round(sum(weight * x**5 for x, weight in gauss_legendre(3)), 9)  # ∫x⁵ = 1/6
        0.166666667
    """
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(nodes)
    return [((float(x) + 1) / 2, float(w) / 2) for x, w in zip(points, weights, strict=True)]


def _best(saved: Tensor, most: int) -> tuple[float, ...]:
    """The mean of each column over the batches; 0 for all but the ``most`` best of them."""
    means = saved.mean(0)
    return tuple(torch.where(means >= means.topk(most).values[-1], means, 0.0).tolist())
