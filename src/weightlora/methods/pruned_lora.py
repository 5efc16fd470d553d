"""PrunedLoRA (Yu et al. 2025, arXiv:2510.00192): starts at a large rank and prunes the components that cost least.

G = ∂L/∂B, H = GᵀG + λ·I and N = G·H⁻¹ give the quadratic model L + tr(GᵀD) + ½·tr(D·H·Dᵀ) of the loss after a change D
of B. Removing component j raises its minimum by ‖b_j − N_j‖² / (2·[H⁻¹]_jj); the same holds for A. The components with
the lowest sum are removed, equally many at every site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weightlora.errors import OptionError
from weightlora.methods.base import Start, recorded
from weightlora.methods.families.moving import Attached, MovingMethod, wide_lora
from weightlora.methods.families.triplets import require_wider
from weightlora.model.distributed import copy_from_first, from_first
from weightlora.validation import Count, Positive

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True, eq=False)
class PrunedLora(MovingMethod):
    """PrunedLoRA.

    Args:
        init_r: Rank at the start. None: 2·r. The paper goes from 128 and more to 64.
        interval: Steps between prunings, and before the first.
        count: Components that each site loses at a pruning.
        recover: ``"eta"`` changes the remaining components to compensate, D = −B_S·([H⁻¹]_SS)⁻¹·[H⁻¹]_S; ``"none"``
            only removes.
        damping: λ in units of the mean of GᵀG's diagonal, positive: GᵀG may have no inverse.
    """

    init_r: Count | None = None
    interval: Count = 10
    count: Count = 2
    recover: Literal["none", "eta"] = "eta"
    damping: Positive = 0.01
    name = "pruned_lora"

    def most_ranks(self, step: int) -> int:
        """Return the ranks that remain after the prunings up to ``step``."""
        prunings = max(step - 1, 0) // self.interval
        return self._sites * max(self._r, self._init_r - self.count * prunings)

    def _start(self, start: Start) -> Attached:
        r = start.lora.r
        init_r = 2 * r if self.init_r is None else self.init_r
        self._sites, self._r, self._init_r = len(start.sites), r, init_r
        require_wider(init_r, r)
        needed = 1 + self.interval * -(-(init_r - r) // self.count)
        if needed > self._total:
            raise OptionError(
                f"from init_r={init_r} to r={r} by {self.count} every {self.interval} steps takes {needed} steps, "
                f"and the training has {self._total}; lower init_r or interval, or raise count"
            )
        return wide_lora(self.name, start, init_r, recorded(self, init_r=init_r))

    def _ready(self) -> None:
        self._masks: dict[str, Tensor] = {n: torch.ones(self._init_r, dtype=torch.bool) for n in self._layers}

    def _in_force(self) -> Mapping[str, Tensor]:
        return self._masks

    def before_step(self, step: int) -> None:
        """Prune at the steps of the schedule, then mask the gradients of pruned components."""
        wanted = self.most_ranks(step) // self._sites
        if any(int(mask.sum()) > wanted for mask in self._masks.values()):
            self._masks = self._pruned(wanted)
        for name, layer in self._layers.items():
            for matrix, dim in _matrices(layer):
                if matrix.grad is not None:
                    matrix.grad.mul_(_along(self._masks[name], matrix, dim))

    @torch.no_grad()
    def after_step(self, step: int) -> None:  # noqa: ARG002 - all steps are alike
        """Set pruned components to zero again, as the optimizer's momentum may move them."""
        for name, layer in self._layers.items():
            for matrix, dim in _matrices(layer):
                matrix.mul_(_along(self._masks[name], matrix, dim))

    def _pruned(self, wanted: int) -> dict[str, Tensor]:
        """Prune each site to ``wanted`` components as the first process does, and return the new masks."""
        pruned: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            mask = self._masks[name]
            pruned[name] = prune(layer, mask, int(mask.sum()) - wanted, recover=self.recover, damping=self.damping)
        copy_from_first([matrix for layer in self._layers.values() for matrix, _ in _matrices(layer)])
        return from_first(lambda: pruned)

    def state(self) -> dict[str, Tensor]:
        """Return which components remain."""
        return dict(self._masks)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set them."""
        self._masks = dict(state)


build = PrunedLora


@torch.no_grad()
def prune(layer: Any, mask: Tensor, count: int, *, recover: str, damping: float) -> Tensor:
    """Remove the ``count`` components of a layer that cost least, and return the new mask."""
    live = mask.nonzero().flatten()
    sides = [(matrix.T if dim == 0 else matrix)[:, live.to(matrix.device)].float() for matrix, dim in _matrices(layer)]
    slopes = [
        torch.zeros_like(side) if matrix.grad is None else (matrix.grad.T if dim == 0 else matrix.grad)[:, live].float()
        for side, (matrix, dim) in zip(sides, _matrices(layer), strict=True)
    ]
    inverses = [_inverse(slope, damping) for slope in slopes]
    rises = [removal_cost(x, g, inverse) for x, g, inverse in zip(sides, slopes, inverses, strict=True)]
    off = (rises[0] + rises[1]).argsort(stable=True)[:count]
    for (matrix, dim), x, inverse in zip(_matrices(layer), sides, inverses, strict=True):
        moved = x + compensation(x, inverse, off) if recover == "eta" else x.clone()
        moved[:, off] = 0
        (matrix.T if dim == 0 else matrix)[:, live.to(matrix.device)] = moved.to(matrix.dtype)
    new = mask.clone()
    new[live[off.cpu()]] = False
    return new


def removal_cost(x: Tensor, gradient: Tensor, inverse: Tensor) -> Tensor:
    """Return the cost of removing each column of ``x`` (d, r): ‖x_j − N_j‖² / (2·[H⁻¹]_jj), N = G·H⁻¹.

    Example:
        >>> removal_cost(torch.eye(2), torch.zeros(2, 2), torch.eye(2))
        tensor([0.5000, 0.5000])
    """
    return (x - gradient @ inverse).square().sum(dim=0) / (2 * inverse.diagonal())


def compensation(x: Tensor, inverse: Tensor, off: Tensor) -> Tensor:
    """Return the D (d, r) with D_S = −X_S that minimises tr(D·H·Dᵀ): −X_S·([H⁻¹]_SS)⁻¹·[H⁻¹]_S."""
    return -x[:, off] @ torch.linalg.solve(inverse[off][:, off], inverse[off])


def _inverse(gradient: Tensor, damping: float) -> Tensor:
    """Return (GᵀG + λ·I)⁻¹, λ relative to the mean of GᵀG's diagonal; the unit matrix without a gradient."""
    h = gradient.T @ gradient
    size = h.diagonal().mean()
    eye = torch.eye(len(h), device=h.device)
    return torch.linalg.inv(h + damping * size * eye) if bool(size > 0) else eye


def _matrices(layer: Any) -> tuple[tuple[Any, int], tuple[Any, int]]:
    """Return A and B, each with the dimension of its components."""
    return (layer.lora_A["default"].weight, 0), (layer.lora_B["default"].weight, 1)


def _along(mask: Tensor, matrix: Tensor, dim: int) -> Tensor:
    return mask.to(matrix.device, matrix.dtype).unsqueeze(1 - dim)
