"""PrunedLoRA (Yu et al. 2025, arXiv:2510.00192): starts at a large rank and prunes the components that cost least.

G = ∂L/∂B, H = GᵀG + λ·I and N = G·H⁻¹ give the quadratic model L + tr(GᵀD) + ½·tr(D·H·Dᵀ) of the loss after a change D
of B. Removing component j raises its minimum by ‖b_j − N_j‖² / (2·[H⁻¹]_jj); the same holds for A. The components with
the lowest sum are removed, equally many at every site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import AttachedPlan, Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.methods.common.export import Factors, become_stock, factors_plan
from weightlora.methods.common.triplets import plan_under, require_steps, triplet_plan
from weightlora.model.distributed import copy_from_first, from_first
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites, require_uniform
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


@dataclass(frozen=True)
class _Options:
    init_r: int | None
    interval: int
    count: int
    recover: Literal["none", "eta"]
    damping: float


def build(
    *,
    init_r: int | None = None,
    interval: int = 10,
    count: int = 2,
    recover: Literal["none", "eta"] = "eta",
    damping: float = 0.01,
) -> Method:
    """Return the method.

    Args:
        init_r: Rank at the start. None: 2·r. The paper goes from 128 and more to 64.
        interval: Steps between prunings, and before the first.
        count: Components that each site loses at a pruning.
        recover: ``"eta"`` changes the remaining components to compensate, D = −B_S·([H⁻¹]_SS)⁻¹·[H⁻¹]_S; ``"none"``
            only removes.
        damping: λ in units of the mean of GᵀG's diagonal.

    Raises:
        OptionError: An argument is out of its range.
    """
    for name, value in (("interval", interval), ("count", count)):
        if value < 1:
            raise OptionError(f"{name}={value} is not allowed: give at least 1")
    if recover not in ("none", "eta"):
        raise OptionError(f"recover={recover!r} is not allowed: give 'none' or 'eta'")
    if not damping > 0:
        raise OptionError(f"damping={damping} is not allowed: give a positive number, GᵀG may have no inverse")
    return PrunedLora(_Options(init_r, interval, count, recover, damping))


class PrunedLora:
    """PrunedLoRA as a method, and the mover that its callback calls."""

    _plan = AttachedPlan()

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._callback = MoverCallback(self)
        self._masks: dict[str, Tensor] | None = None

    @property
    def plan(self) -> AdapterPlan:
        """The current ranks."""
        return plan_under(self._plan, self._masks)

    def budget(self, step: int) -> int:
        """Return the ranks that remain after the prunings up to ``step``."""
        prunings = max(step - 1, 0) // self._options.interval
        return self._sites * max(self._r, self._init_r - self._options.count * prunings)

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put LoRA of the large rank on all sites, each rank with plain LoRA's scale."""
        sites = find_sites(model, lora).sites
        init_r = 2 * lora.r if self._options.init_r is None else self._options.init_r
        _require_schedule(lora, init_r, self._options, total_steps)
        self._total, self._sites, self._r, self._init_r = total_steps, len(sites), lora.r, init_r
        record = {**asdict(self._options), "init_r": init_r}
        plan = triplet_plan(model, lora, sites, init_r, rule="pruned_lora", options=record)
        alpha = lora.lora_alpha * init_r / lora.r
        self._plan = replace(plan, entries=tuple(replace(e, alpha=alpha) for e in plan.entries))
        attached = self._plan.attach(model)
        self._layers: dict[str, Any] = dict(lora_layers(attached))
        self._masks = {name: torch.ones(init_r, dtype=torch.bool) for name in self._layers}
        tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([tuner, tuner.model], "pruned_lora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback: pruning before an optimizer step, and zeros of what is pruned after it."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the remaining components.

        Raises:
            SelectionError: More remain than the budget allows.
        """
        ranks, budget = sum(self.plan.ranks.values()), self._sites * self._r
        if self._masks is None or ranks > budget:
            raise SelectionError(
                f"pruned_lora has {ranks} ranks left, {budget} are the budget: it did not run to the end; give the "
                "trainer callbacks=method.callbacks(), and train all of the steps"
            )
        layers: dict[str, Any] = dict(lora_layers(model))
        factors = {name: _kept(layer, self._masks[name]) for name, layer in layers.items()}
        self._plan, self._masks = factors_plan(self._plan, factors), None
        self._remove_watch()
        return become_stock(model, self._plan, factors)

    def begin(self, total_steps: int) -> None:
        """Check that the training takes the steps that the schedule was made for.

        Raises:
            OptionError: The training takes more or fewer.
        """
        require_steps("pruned_lora", self._total, total_steps)
        self._remove_watch()

    def before_step(self, step: int) -> None:
        """Prune at the steps of the schedule, then mask the gradients of pruned components."""
        assert self._masks is not None
        wanted = self.budget(step) // self._sites
        if any(int(mask.sum()) > wanted for mask in self._masks.values()):
            self._masks = self._pruned(self._masks, wanted)
        for name, layer in self._layers.items():
            for matrix, dim in _matrices(layer):
                if matrix.grad is not None:
                    matrix.grad.mul_(_along(self._masks[name], matrix, dim))

    def after_step(self, step: int) -> None:  # noqa: ARG002 - all steps are alike
        """Set pruned components to zero again, as the optimizer's momentum may move them."""
        assert self._masks is not None
        with torch.no_grad():
            for name, layer in self._layers.items():
                for matrix, dim in _matrices(layer):
                    matrix.mul_(_along(self._masks[name], matrix, dim))

    def _pruned(self, masks: dict[str, Tensor], wanted: int) -> dict[str, Tensor]:
        """Prune each site to ``wanted`` components as the first process does, and return the new masks."""
        pruned = {
            name: prune(layer, masks[name], int(masks[name].sum()) - wanted, self._options)
            for name, layer in self._layers.items()
        }
        copy_from_first([matrix for layer in self._layers.values() for matrix, _ in _matrices(layer)])
        return from_first(lambda: pruned)

    def state(self) -> dict[str, Tensor]:
        """Return which components remain."""
        return dict(self._masks or {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set them."""
        self._masks = dict(state)


@torch.no_grad()
def prune(layer: Any, mask: Tensor, count: int, options: _Options) -> Tensor:
    """Remove the ``count`` components of a layer that cost least, and return the new mask."""
    live = mask.nonzero().flatten()
    sides = [(matrix.T if dim == 0 else matrix)[:, live.to(matrix.device)].float() for matrix, dim in _matrices(layer)]
    slopes = [
        torch.zeros_like(side) if matrix.grad is None else (matrix.grad.T if dim == 0 else matrix.grad)[:, live].float()
        for side, (matrix, dim) in zip(sides, _matrices(layer), strict=True)
    ]
    inverses = [_inverse(slope, options.damping) for slope in slopes]
    rises = [removal_cost(x, g, inverse) for x, g, inverse in zip(sides, slopes, inverses, strict=True)]
    off = (rises[0] + rises[1]).argsort(stable=True)[:count]
    for (matrix, dim), x, inverse in zip(_matrices(layer), sides, inverses, strict=True):
        moved = x + compensation(x, inverse, off) if options.recover == "eta" else x.clone()
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


def _kept(layer: Any, mask: Tensor) -> Factors:
    (a, _), (b, _) = _matrices(layer)
    kept = mask.to(a.device)
    return Factors(a.detach()[kept], b.detach()[:, kept], layer.scaling["default"])


def _require_schedule(lora: LoraConfig, init_r: int, options: _Options, total_steps: int) -> None:
    require_uniform("pruned_lora", lora)
    if init_r <= lora.r:
        raise OptionError(f"init_r={init_r} is not allowed: give more than r={lora.r}, the rank at the end")
    needed = 1 + options.interval * -(-(init_r - lora.r) // options.count)
    if needed > total_steps:
        raise OptionError(
            f"from init_r={init_r} to r={lora.r} by {options.count} every {options.interval} steps takes {needed} "
            f"steps, and the training has {total_steps}; lower init_r or interval, or raise count"
        )
