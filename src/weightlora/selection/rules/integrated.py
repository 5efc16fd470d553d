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

from weightlora.errors import OptionError
from weightlora.model.distributed import copy_from_first
from weightlora.model.gates import gated
from weightlora.plan.budget import Budget, whole_budget
from weightlora.selection._batch_means import batch_means
from weightlora.selection.rules.base import require, require_head_steps
from weightlora.selection.stage import evaluated, let_train, train_adapters

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.plan.ranking import Ranking
    from weightlora.selection.rules.base import Scores
    from weightlora.selection.stage import Stage

Per = Literal["site", "rank"]


@dataclass(frozen=True)
class Integrated:
    """Train LoRA on all sites for T steps, then score site i by −∫₀¹ ∂L/∂ω_i dω, all gates being scaled together.

    This is the Aumann–Shapley value (1974) of the adapter in the game "loss that all adapters save together"; for
    features of an input it is known as integrated gradients (arXiv:1703.01365). The scores sum to the loss saved on the
    batches that they are read from. Those are further batches, which the adapters were not trained on. The integral is
    taken by Gauss–Legendre quadrature, and dropout is off.

    With ``rounds`` above 1 the sites are eliminated step by step: each round trains for T/rounds steps and drops the
    sites with the lowest scores, so that those that stay learn to do without the others. Sites shrink from n to the
    budget's K by the same factor each round. A dropped site has the score 0.

    With ``per="rank"`` the trained B·A of each site is rotated to its singular vectors, and every rank has a gate. The
    scores of a site's ranks add up to the site's. The budget is then spent rank by rank, by score per parameter: a site
    may keep any rank from 0 to r, at the same alpha/r.

    LoRA on all sites wants a lower learning rate than the few sites that are kept: at the training's own it can
    diverge, and the scores then tell what diverged. So adapters are trained at ``lr_scale`` times that rate.

    Args:
        nodes: Points of the quadrature, each one forward and backward pass.
        probes: Further batches that the scores are read from, in each round.
        rounds: How often sites are scored.
        per: ``"site"`` keeps or drops whole adapters, ``"rank"`` single ranks.
        most_ranks: With ``per="rank"``, a site keeps at most so many ranks; None: any number up to r. ``"even"``: at
            most the budget's share of its r ranks, rounded up. At a tenth of rank 10 these are one rank on each site.
        lr_scale: Factor of the learning rate of the adapters, not of a head. None: √(K/m) where m sites are trained and
            the budget holds K, counted in the order of their names. Best rates of few sites and of all differ by about
            that factor.
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Integrated(probes=8)
        Integrated(nodes=3, probes=8, rounds=1, per='site', most_ranks=None, lr_scale=None, head_steps=None)
    """

    nodes: int = 3
    probes: int = 4
    rounds: int = 1
    per: Per = "site"
    most_ranks: int | Literal["even"] | None = None
    lr_scale: float | None = None
    head_steps: int | None = None
    name: ClassVar[str] = "integrated"
    knobs: ClassVar[tuple[str, ...]] = ()
    trains_adapters: ClassVar[bool] = True
    least_steps: ClassVar[int] = 30
    ranking: ClassVar[Ranking] = "score"

    def __post_init__(self) -> None:
        require(self.nodes >= 1, f"nodes={self.nodes!r}", "1 or more points")
        require(self.probes >= 2, f"probes={self.probes!r}", "2 or more batches")
        require(self.rounds >= 1, f"rounds={self.rounds!r}", "1 or more rounds")
        require(self.per in get_args(Per), f"per={self.per!r}", f"one of {', '.join(get_args(Per))}")
        most, known = self.most_ranks, self.most_ranks in (None, "even")
        whole = isinstance(most, int) and not isinstance(most, bool) and most >= 1
        require(known or whole, f"most_ranks={most!r}", "1 or more ranks, or 'even'")
        require(most is None or self.per == "rank", f"most_ranks with per={self.per!r}", "per='rank'")
        scale = self.lr_scale
        require(scale is None or 0 < scale < math.inf, f"lr_scale={scale!r}", "a positive number, or None")
        require_head_steps(self.head_steps)

    def batches(self, steps: Sequence[int]) -> int:
        """T batches to train on, and those that the scores are read from."""
        return steps[-1] + self._readings(steps) * self.probes

    def passes(self, steps: Sequence[int]) -> int:
        """One for each batch to train on, and one for each node on the others."""
        return steps[-1] + self._readings(steps) * self.probes * self.nodes

    def _readings(self, steps: Sequence[int]) -> int:
        """How often scores are read: after each round, or after each number of steps where there is one round."""
        return self.rounds if self.rounds > 1 else len(steps)

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the scores; the history has a row for each batch that they are read from.

        Raises:
            OptionError: There are fewer steps than rounds, or the budget cannot be spent on single ranks.
        """
        require(steps[-1] >= self.rounds, f"steps={steps[-1]}", f"at least rounds={self.rounds}")
        most = self._most(stage, budget)  # a mistake is found before anything is trained
        if self.rounds > 1:
            yield steps[-1], self._eliminated(stage, steps[-1], budget, most)
            return
        history: list[tuple[float, ...]] = []
        for start, end in pairwise((0, *steps)):
            train_adapters(stage, steps=end - start, lr=stage.lr, scale=self._scale(budget, stage, len(stage.layers)))
            scores = self._read(stage, most)
            history += scores.history
            yield end, replace(scores, history=tuple(history))

    def _eliminated(self, stage: Stage, steps: int, budget: Chooser, most: Sequence[int]) -> Scores:
        """The scores after several rounds, each of which trains and reads only the sites that stay."""
        names = list(stage.layers)
        staying = list(range(len(names)))
        history: list[tuple[float, ...]] = []
        found: list[Scores] = []
        for done in range(self.rounds):
            if found:
                last = found[-1].final
                share = len(budget.choose(last)) / len(names)
                count = round(len(names) * share ** (done / self.rounds))
                staying = sorted(sorted(staying, key=lambda i: -last[i])[:count])
                _switch_off(stage, staying)
            trained = [names[i] for i in staying]
            scale = self._scale(budget, stage, len(trained))
            train_adapters(stage, steps=len(range(done, steps, self.rounds)), lr=stage.lr, names=trained, scale=scale)
            found.append(self._read(stage, most))
            history += found[-1].history
        # In the first round all sites are there.
        return replace(found[-1], history=tuple(history), has_gradient=found[0].has_gradient)

    def _scale(self, budget: Chooser, stage: Stage, trained: int) -> float:
        """The factor of the learning rate while so many sites are trained."""
        if self.lr_scale is not None:
            return self.lr_scale
        kept = len(budget.choose((1.0,) * len(stage.layers)))  # nothing is scored yet: sites of equal score
        return math.sqrt(min(1.0, kept / trained))

    def _most(self, stage: Stage, budget: Chooser) -> list[int]:
        """How many ranks each site may keep; none where sites are kept whole.

        Raises:
            OptionError: The budget cannot be spent on single ranks, or has no share.
        """
        if self.per == "site":
            return []
        whole = whole_budget(budget)
        all_ranks = [b.shape[1] for b in stage.parameters("lora_B")]
        if self.most_ranks == "even":
            if not isinstance(whole, Budget):
                raise OptionError("most_ranks='even' needs keep as a fraction or a number; give it, or most_ranks=None")
            total = sum(whole.costs)
            return [math.ceil(Fraction(r * min(whole.limit, total), total)) for r in all_ranks]
        return [r if self.most_ranks is None else min(self.most_ranks, r) for r in all_ranks]

    def _read(self, stage: Stage, most: Sequence[int]) -> Scores:
        """The scores of the adapters as they are now; with single ranks, 0 for those that are more than ``most``."""
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


def _switch_off(stage: Stage, staying: Sequence[int]) -> None:
    """Set B of all other sites to zero: their adapters add nothing from here on."""
    kept = set(staying)
    with torch.no_grad():
        for i, matrix in enumerate(stage.parameters("lora_B")):
            if i not in kept:
                matrix.zero_()
