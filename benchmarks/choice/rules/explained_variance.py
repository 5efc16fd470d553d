"""The rule ``explained_variance``: layers first whose inputs lie near a subspace of the adapter's rank."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.model.distributed import add_up
from weightlora.selection.rules.base import Rule, Scores, jackknife, require

from .layer_inputs import layer_inputs

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage

#: Halves of the batches. Each further group would cost another moment matrix a site.
_GROUPS = 2


@dataclass(frozen=True)
class ExplainedVariance(Rule):
    """Score a site by the share of its inputs' variance in their r leading directions (EVA, arXiv:2410.07170).

    The share is Σ_{j≤r} λ_j ÷ Σ_j λ_j. r is the site's rank, and λ are the eigenvalues of Σ z·zᵀ over the tokens of all
    batches, not centred, as in EVA. No gradient is computed.

    Each site keeps two matrices of in × in numbers, one for either half of the batches. The standard errors are those
    of a jackknife over these two halves, and so rough. The history has one row, because each row would take an
    eigendecomposition a site.

    Args:
        exact_up_to: Inputs with more features are sketched: in × (4r + 16) numbers, from which Nyström's method
            (Tropp et al. 2017, arXiv:1706.05736) finds the leading eigenvalues. It never overestimates them.
        head_steps: Steps in which a new head is trained alone first. 0, because no site's input depends on the head.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> ExplainedVariance(exact_up_to=1024)
        ExplainedVariance(head_steps=0, exact_up_to=1024)
    """

    exact_up_to: int = 4096
    head_steps: int | None = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.exact_up_to
        whole = isinstance(given, int) and given >= 0  # pyright: ignore[reportUnnecessaryIsInstance]
        require(whole, f"exact_up_to={given!r}", "a whole number of features, 0 or more")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the last scores, in one row; nothing is trained."""
        moments = {name: _Moments.of(layer, self.exact_up_to) for name, layer in stage.layers.items()}
        step = 0

        def add(site: str, z: Tensor) -> None:
            moments[site].add(z, step % _GROUPS)

        with layer_inputs(stage, add):
            for step in range(steps[-1]):
                stage.forward("scoring", step + 1)
        shares: dict[tuple[int, ...], list[float]] = {(0,): [], (1,): [], (0, 1): []}
        for site in moments.values():
            site.add_up()
            for chosen, found in shares.items():
                found.append(site.share(chosen))
            site.sums.clear()
        known = jackknife(lambda chosen: torch.tensor(shares[tuple(chosen)], dtype=torch.float64), _GROUPS)
        measured = tuple(share > 0 for share in known.scores)
        yield (
            steps[-1],
            Scores((known.scores,), measured, known.scores, errors=known.errors, halves=known.halves),
        )


@dataclass
class _Moments:
    """M = Σ z·zᵀ over the tokens of each group, (in, in), or its sketch M·Ω, (in, k)."""

    r: int
    omega: Tensor | None
    """Ω, (in, k), with orthonormal columns; None where M itself is kept."""
    sums: list[Tensor]
    energy: Tensor
    """Σ‖z‖² of each group, (groups,)."""

    @classmethod
    def of(cls, layer: LoraLayer, exact_up_to: int) -> _Moments:
        a: Any = layer.lora_A["default"].weight
        r, features = a.shape
        omega = None
        width = min(features, 4 * r + 16)
        if features > exact_up_to:
            # The seed of the scoring, and not the generator's state: all processes need the same Ω.
            generator = torch.Generator().manual_seed(torch.initial_seed())
            drawn = torch.randn(features, width, dtype=torch.float64, generator=generator)
            omega = torch.linalg.qr(drawn).Q.to(a)
        columns = features if omega is None else width
        dtype = torch.promote_types(a.dtype, torch.float32)
        sums = [torch.zeros(features, columns, dtype=dtype, device=a.device) for _ in range(_GROUPS)]
        return cls(r, omega, sums, torch.zeros(_GROUPS, dtype=torch.float64))

    def add(self, z: Tensor, group: int) -> None:
        """Add the tokens ``z``, (n, in)."""
        z = z.to(self.sums[group])
        self.sums[group].addmm_(z.T, z if self.omega is None else z @ self.omega.to(z))
        self.energy[group] += z.square().sum().double().cpu()

    def add_up(self) -> None:
        """Add up the processes."""
        self.sums = [add_up(sums) for sums in self.sums]
        self.energy = add_up(self.energy)

    def share(self, groups: Sequence[int]) -> float:
        """The share of the r leading eigenvalues of M, over the tokens of ``groups``; 0 where there are none."""
        energy = float(self.energy[list(groups)].sum())
        if energy == 0:
            return 0.0
        total = torch.stack([self.sums[group] for group in groups]).sum(0)
        values = torch.linalg.eigvalsh(total) if self.omega is None else nystrom_eigenvalues(total, self.omega)
        return min(1.0, float(values[-self.r :].double().sum()) / energy)


def nystrom_eigenvalues(sketch: Tensor, omega: Tensor) -> Tensor:
    """Return the leading eigenvalues of a positive semidefinite M by its sketch M·Ω, in ascending order.

    They are those of M·Ω·(ΩᵀMΩ)⁺·(M·Ω)ᵀ, which is at most M, and equals M where M's rank is at most Ω's.

    Args:
        sketch: M·Ω, (in, k).
        omega: Ω, (in, k), with orthonormal columns.

    Example:
        >>> v = torch.tensor([[3.0], [0.0], [4.0]])
        >>> omega = torch.eye(3)[:, :2]
        >>> nystrom_eigenvalues(v @ v.T @ omega, omega).round().tolist()
        [25.0]
    """
    rounding = torch.finfo(sketch.dtype).eps * len(sketch)
    sketch, omega = sketch.double().cpu(), omega.double().cpu()
    core = omega.T @ sketch
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > rounding * values[-1]  # the others are rounding errors, which division would blow up
    return torch.linalg.svdvals(sketch @ vectors[:, kept] / values[kept].sqrt()).square().flip(0)
