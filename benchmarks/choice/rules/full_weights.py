"""Rules that score by the gradient of a site's full weight: ``Aletheia``, ``RelativeGradient`` and ``GoRA``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightlora.errors import SelectionError
from weightlora.selection.rules.base import GROUPS, Estimate, Rule, Scores, batch_means, jackknife
from weightlora.selection.rules.kappa_tune import full_weight
from weightlora.selection.stage import let_train

from .weight_gradients import gradient_norms, weight_gradients

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Aletheia(Rule):
    """Give each site the score of its block: the mean over T batches of Σ ‖∂L/∂W‖_F over the block's sites.

    Aletheia (arXiv:2604.15351) keeps the best half of the blocks. All sites of a block have the same score, so a budget
    is spent on whole blocks as far as it goes. A site outside all blocks is a block of its own.

    Its code (aletheia-lora 0.1.2) differs: it reads five single rows, adds the norms of a block's biases and
    normalisations, and takes the loss over all tokens.

    A step needs memory for the gradients of all adapted weights, in fp32.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Aletheia()
        Aletheia(head_steps=None)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients, so that the backward pass reaches every site."""
        blocks = [site.block or site.name for site in stage.sites]
        places = {block: place for place, block in enumerate(dict.fromkeys(blocks))}
        own = torch.tensor([places[block] for block in blocks])
        for step, norms in gradient_norms(stage, steps):
            sums = norms.new_zeros(len(norms), len(places)).index_add(1, own, norms)
            # Of a block that has a gradient, a site may have none.
            yield step, replace(batch_means(sums[:, own]), has_gradient=tuple((norms != 0).any(0).tolist()))


@dataclass(frozen=True)
class RelativeGradient(Rule):
    """Score a site by the mean over T batches of ‖∂L/∂W‖_F ÷ ‖W‖_F, where W is its frozen weight.

    This is the relative gradient norm, RGN, of auto-RGN (Lee et al. 2023, arXiv:2210.11466), for one weight instead of
    a layer. The adapter plays no part: neither A nor the rank changes the score.

    A step needs memory for the gradients of all adapted weights, in fp32.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> RelativeGradient()
        RelativeGradient(head_steps=None)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients, so that the backward pass reaches every site.

        Raises:
            SelectionError: A site's weight is zero.
        """
        sizes = _sizes(stage)
        for step, norms in gradient_norms(stage, steps):
            yield step, batch_means(norms / sizes)


def _sizes(stage: Stage) -> Tensor:
    """‖W‖_F of each site."""
    sizes = torch.stack([full_weight(layer).norm().cpu().double() for layer in stage.layers.values()])
    zero = [name for name, size in zip(stage.layers, sizes.tolist(), strict=True) if size == 0]
    if zero:
        raise SelectionError(
            f"the weight of {zero[0]} is zero, so no gradient is relative to it; leave the site out of target_modules, "
            "or use another rule"
        )
    return sizes


#: Entries of each weight, at most, whose gradients are kept by group of batches. Groups of whole weights would take
#: eight times the memory, and the mean of so many entries hardly differs from that of all.
_SAMPLE = 2**16


@dataclass(frozen=True)
class GoRA(Rule):
    """Score a site by the mean over entries of |W ⊙ Ḡ|, divided by √(in + out).

    W is the site's frozen weight, and Ḡ the mean of ∂L/∂W over T batches. |w·g| estimates how much the loss would
    change without this entry. GoRA (arXiv:2502.12171) assigns ranks in proportion to this score and clips them to a
    range. Clipping matters for ranks only and is left out here, and so is GoRA's initialisation of B.

    The score is exact. Its standard error and the two halves use at most 65,536 entries of each weight. Memory is
    needed for the gradients of all adapted weights, in fp32.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> GoRA(head_steps=5)
        GoRA(head_steps=5)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients, so that the backward pass reaches every site."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        layers = list(stage.layers.values())
        groups = min(GROUPS, steps[0])
        history: list[tuple[float, ...]] = []
        with weight_gradients(stage.layers) as weights:
            samples = [_Sample.of(weight, groups) for weight in weights]
            for step in range(1, steps[-1] + 1):
                stage.backward("scoring", step, [*matrices, *weights])  # the gradients of all steps add up
                for b in matrices:
                    b.grad = None
                for weight, sample in zip(weights, samples, strict=True):
                    sample.update(weight.grad, (step - 1) % groups)
                found = [_score(full_weight(layer), w, step) for layer, w in zip(layers, weights, strict=True)]
                history.append(tuple(torch.stack(found).tolist()))
                if step in steps:
                    # Gradients that cancel leave a sum of zero, but not in each group.
                    moved = tuple(_moves(w) or bool(s.sums.any()) for w, s in zip(weights, samples, strict=True))
                    known = _known(layers, weights, samples, step)
                    last = history[-1]
                    yield step, Scores(tuple(history), moved, last, errors=known.errors, halves=known.halves)


def _known(layers: Sequence[LoraLayer], weights: Sequence[Tensor], samples: Sequence[_Sample], steps: int) -> Estimate:
    """The standard errors and the halves, by the sampled entries."""
    entries = [full_weight(layer).take(s.positions) for layer, s in zip(layers, samples, strict=True)]
    roots = torch.tensor([_root(weight) for weight in weights])
    groups = len(samples[0].sums)
    counts = [len(range(group, steps, groups)) for group in range(groups)]

    def score(chosen: Sequence[int]) -> Tensor:
        count = sum(counts[group] for group in chosen)
        sums = [sample.sums[list(chosen)].sum(0) for sample in samples]
        found = [(w * total).abs().mean().cpu() for w, total in zip(entries, sums, strict=True)]
        return torch.stack(found) / count / roots

    return jackknife(score, groups)


@dataclass
class _Sample:
    """Sums of a weight's gradient by group of batches, at some of its entries."""

    positions: Tensor
    """Places in the flat weight, shape (m,)."""
    sums: Tensor
    """Shape (groups, m)."""
    total: Tensor
    """Their sum so far, shape (m,)."""

    @staticmethod
    def of(weight: Tensor, groups: int) -> _Sample:
        """Return zeros at all entries of ``weight``, or at a random choice of a large one."""
        size = weight.numel()
        generator = torch.Generator().manual_seed(0)  # the same entries in all processes
        chosen = torch.randint(size, (_SAMPLE,), generator=generator) if size > _SAMPLE else torch.arange(size)
        zeros = weight.new_zeros(groups, len(chosen))
        return _Sample(chosen.to(weight.device), zeros, zeros[0].clone())

    def update(self, gradients: Tensor | None, group: int) -> None:
        """Add what ``gradients``, the sum over all batches so far, has gained in a batch of ``group``."""
        if gradients is not None:
            total = gradients.take(self.positions)
            self.sums[group] += total - self.total
            self.total = total


def _score(weight: Tensor, gradients: Tensor, steps: int) -> Tensor:
    """The score of one site, where ``gradients.grad`` is the sum of ∂L/∂W over ``steps`` batches."""
    if gradients.grad is None:
        return torch.zeros((), dtype=weight.dtype)
    return ((weight * gradients.grad).abs_().mean() / steps / _root(weight)).cpu()


def _moves(weight: Tensor) -> bool:
    return weight.grad is not None and bool(weight.grad.any())


def _root(weight: Tensor) -> float:
    """√(in + out)."""
    return float(sum(weight.shape)) ** 0.5
