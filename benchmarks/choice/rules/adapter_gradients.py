"""Rules that score by the gradient of an adapter's B at B = 0: ``Fisher`` and ``CrossFitted``."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from weightlora.model.distributed import add_up
from weightlora.selection.rules.base import GROUPS, Rule, Scores, batch_means, jackknife, require
from weightlora.selection.rules.kappa_tune import wide
from weightlora.selection.stage import let_train

from .weight_gradients import in_backward

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Fisher(Rule):
    """Score a site by the mean over T batches of ‖∂L/∂B‖²_F at B = 0, the trace of B's empirical Fisher information.

    FIM-LoRA (arXiv:2605.16800) ranks sites by the mean of g² over entries and batches. Here the entries are summed, so
    that a site counts as a whole. g is the gradient of a batch's mean loss, not of one example's loss: a batch's noise
    counts less than in the Fisher information of single examples. Unlike ``first_order``, gradients of opposite signs
    in different batches do not cancel.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Fisher(head_steps=5)
        Fisher(head_steps=5)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        seen: list[Tensor] = []
        for step in range(1, steps[-1] + 1):
            stage.backward("scoring", step, matrices)
            norms = [
                torch.zeros(()) if b.grad is None else torch.linalg.vector_norm(b.grad, dtype=wide(b.grad)).cpu()
                for b in matrices
            ]
            seen.append(torch.stack(norms).double().square())  # in fp32 the square of a small norm would be zero
            for b in matrices:
                b.grad = None
            if step in steps:
                yield step, batch_means(torch.stack(seen))


#: Groups from which both halves still have two, and so a pair.
_LEAST = 4


@dataclass(frozen=True)
class CrossFitted(Rule):
    """Score a site by the loss drop along a unit direction that other batches chose.

    The T batches are split into at most 8 groups. With G_i the mean of ∂L/∂B over group i at B = 0, the score is the
    mean over ordered pairs of different groups of ⟨H_i, H_j⟩ ÷ ‖H_i‖_F, where

        H_i = G_i·(C + λI)^(-1/2),   C = E[u uᵀ] over the tokens,   u = A·x,   λ = damping·trace(C)/r.

    The direction H_i/‖H_i‖_F stands for the step B = −H_i·(C + λI)^(-1/2)/‖H_i‖_F. Up to λ, it changes the output B·u
    by 1 in root mean square over the tokens, whatever A and the scale of x are. ⟨H_i, H_j⟩/‖H_i‖_F is how fast the loss
    of group j falls along it. Noise has no part in it on average, since the batches of group j did not choose the
    direction. A site whose batches disagree has a score around zero or below and is not kept.

    Any other root of (C + λI)^(-1) rotates all H_i alike and gives the same score. So C is factorised by Cholesky, and
    only the inner products ⟨H_i, H_j⟩ are computed: one matrix of 8 × 8 for a site. C is taken over the tokens of all
    batches, padding included. It does not depend on the loss, and the standard error takes it as known.

    With fewer than 4 steps there are no standard errors and no halves.

    Args:
        damping: λ as a fraction of the mean eigenvalue of C, above 0. A larger one trusts directions less in which the
            tokens hardly vary.
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> CrossFitted(damping=0.1)
        CrossFitted(head_steps=None, damping=0.1)
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.damping < float("inf"), f"damping={self.damping}", "a positive number")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        groups = min(GROUPS, steps[0])
        sums = [torch.zeros(groups, *b.shape, dtype=wide(b), device=b.device) for b in matrices]  # (groups, out, r)
        counts = torch.zeros(groups, dtype=torch.float64)
        products = torch.zeros(len(matrices), groups, groups, dtype=torch.float64)
        history: list[tuple[float, ...]] = []
        with _second_moments(stage.layers) as moments:
            for step in range(steps[-1]):
                stage.backward("scoring", step + 1, matrices)
                group = step % groups
                counts[group] += 1
                for b, total in zip(matrices, sums, strict=True):
                    if b.grad is not None:
                        total[group] += b.grad
                        b.grad = None
                roots = [_inverse_root(c, self.damping) for c in _means(moments)]
                products = torch.stack([_products(s, root) for s, root in zip(sums, roots, strict=True)])
                products /= counts.clamp(min=1)[:, None] * counts.clamp(min=1)  # of sums → of means
                history.append(tuple(_gains(products, range(min(step + 1, groups))).tolist()))
                if step + 1 in steps:
                    yield step + 1, _scores(history, products)


def _scores(history: Sequence[tuple[float, ...]], products: Tensor) -> Scores:
    """The last scores of ``history``, which the inner products belong to, (n, groups, groups)."""
    groups, last = len(products[0]), history[-1]
    moved = tuple((products.diagonal(dim1=1, dim2=2) > 0).any(1).tolist())
    if groups < _LEAST:
        return Scores(tuple(history), moved, last)
    known = jackknife(lambda chosen: _gains(products, chosen), groups)
    return Scores(tuple(history), moved, last, errors=known.errors, halves=known.halves)


def _gains(products: Tensor, chosen: Sequence[int]) -> Tensor:
    """The mean of ⟨H_i, H_j⟩/‖H_i‖ over pairs of different groups, for each site; zero without a pair.

    Args:
        products: ⟨H_i, H_j⟩, shape (n, groups, groups).
        chosen: The groups that count.
    """
    picked = list(chosen)
    inner = products[:, picked][:, :, picked]
    squares = inner.diagonal(dim1=1, dim2=2)
    gains = torch.where(squares > 0, (inner.sum(2) - squares) / squares.sqrt(), 0.0)  # no gradient: no direction
    return gains.sum(1) / max(1, len(picked) * (len(picked) - 1))


def _products(sums: Tensor, root: Tensor) -> Tensor:
    """⟨S_i·R, S_j·R⟩ of the matrices S_i in ``sums``, as (groups, groups) in fp64 on the CPU."""
    whitened = (sums @ root.to(sums)).flatten(1)
    return (whitened @ whitened.t()).double().cpu()


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """R with R·Rᵀ = (C + λI)^(-1), by Cholesky; zero where C is, for then no token reaches the adapter."""
    mean = moment.diagonal().mean()
    if mean <= 0:
        return torch.zeros_like(moment)
    identity = torch.eye(len(moment), dtype=moment.dtype)
    factor = torch.linalg.cholesky(moment + damping * mean * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False).t()


@dataclass
class _Moment:
    """A sum of u·uᵀ over tokens, where u = A·x."""

    total: Tensor
    """Shape (r, r)."""
    tokens: int = 0


@contextmanager
def _second_moments(layers: Mapping[str, LoraLayer]) -> Generator[list[_Moment]]:
    """Sum u·uᵀ of each layer within the block, before dropout, over the tokens that the loss depends on."""
    matrices: dict[str, Tensor] = {name: layer.lora_A["default"].weight for name, layer in layers.items()}  # pyright: ignore[reportAssignmentType]
    moments = {
        name: _Moment(torch.zeros(len(a), len(a), dtype=wide(a), device=a.device)) for name, a in matrices.items()
    }

    def product(name: str, x: Tensor) -> Tensor:
        a = matrices[name].detach()
        with torch.autocast(a.device.type, enabled=False):
            return x.to(a) @ a.t()  # (tokens, r)

    def add(name: str, u: Tensor, _gradient: Tensor) -> None:
        moment = moments[name]
        u = u.to(moment.total)
        moment.total += u.t() @ u
        moment.tokens += len(u)

    with in_backward(layers, product, add):
        yield list(moments.values())


def _means(moments: Sequence[_Moment]) -> list[Tensor]:
    """E[u uᵀ] of each layer over the tokens of all processes, in fp64 on the CPU."""
    flat = torch.cat([moment.total.flatten().cpu().double() for moment in moments])
    tokens = torch.tensor([moment.tokens for moment in moments], dtype=torch.float64)
    *squares, tokens = add_up(torch.cat([flat, tokens])).split([*(m.total.numel() for m in moments), len(moments)])
    return [
        (square / max(1.0, count)).reshape(moment.total.shape)
        for square, count, moment in zip(squares, tokens.tolist(), moments, strict=True)
    ]
