"""Dynamic LoRA (Mao et al. 2024, "DoRA", arXiv:2405.17357; not PEFT's DoRA): prunes components with a small share.

ΔW = s·Σ_j c_j·b_j·a_j, and a component's share of its site's update is s_j = ‖b_j‖·‖a_j‖·|c_j| / ‖B·diag(c)·A‖. The
components with the smallest average shares, over all sites together, are set to 0. How many follows a cubic curve in a
window of the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from weightlora.errors import OptionError
from weightlora.methods.base import AttachedPlan, Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.methods.common.schedules import require_window, window
from weightlora.methods.common.triplets import (
    Alpha,
    attach_triplets,
    export_triplets,
    plan_under,
    require_steps,
    switch_off,
    triplet_plan,
)
from weightlora.model.distributed import from_first
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


@dataclass(frozen=True)
class _Options:
    init_r: int | None
    begin: float
    end: float
    interval: int
    beta: float
    variance_weight: float
    alpha: Alpha


def build(
    *,
    init_r: int | None = None,
    begin: float = 0.15,
    end: float = 0.5,
    interval: int = 100,
    beta: float = 0.9,
    variance_weight: float = 0.1,
    alpha: Alpha = "scale",
) -> Method:
    """Return the method.

    Args:
        init_r: Components of a site at the start. None: 1.5·r, rounded up.
        begin: Share of the training before the first pruning.
        end: Share of the training after which the ranks are final.
        interval: Steps between prunings. In between, pruned components may return.
        beta: Decay of the average shares.
        variance_weight: η of the penalty on the variance of the entries of a_j and b_j, until the ranks are final.
        alpha: ``"scale"`` scales every rank by alpha/r as in plain LoRA, ``"keep"`` by alpha/init_r.

    Raises:
        OptionError: An argument is out of its range.
    """
    require_window(begin, end)
    if interval < 1:
        raise OptionError(f"interval={interval} is not allowed: give at least 1 step")
    if not 0 <= beta < 1:
        raise OptionError(f"beta={beta} is not allowed: give a number in [0, 1)")
    return DynamicLora(_Options(init_r, begin, end, interval, beta, variance_weight, alpha))


class DynamicLora:
    """Dynamic LoRA as a method, and the mover that its callback calls."""

    _plan = AttachedPlan()

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._callback = MoverCallback(self)
        self._mask: dict[str, Tensor] | None = None

    @property
    def plan(self) -> AdapterPlan:
        """The current ranks: pruned after each pruning, full before the first and between two of them."""
        return plan_under(self._plan, self._mask)

    def budget(self, step: int) -> int:
        """Return the starting ranks minus those that the curve prunes; all of them at steps that do not prune."""
        pruned = self._pruned(step)
        return self._high - (pruned or 0)

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put components with c = 0, A and B uniform, on all sites."""
        sites = find_sites(model, lora).sites
        init_r = math.ceil(1.5 * lora.r) if self._options.init_r is None else self._options.init_r
        self._total, self._mask = total_steps, None
        self._first, self._last = window(self._options.begin, self._options.end, total_steps)
        self._low, self._high = len(sites) * lora.r, len(sites) * init_r
        record = {**asdict(self._options), "init_r": init_r}
        self._plan = triplet_plan(model, lora, sites, init_r, rule="dynamic_lora", options=record)
        attached = attach_triplets(
            model,
            lora,
            sites,
            init_r=init_r,
            alpha=self._options.alpha,
            name="dynamic_lora",
            total_step=total_steps,
            orth_reg_weight=0.0,
        )
        self._layers: dict[str, Any] = dict(lora_layers(attached))
        for layer in self._layers.values():
            for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
                torch.nn.init.kaiming_uniform_(matrix)
        self._shares = {name: torch.zeros(init_r) for name in self._layers}
        tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([tuner, tuner.model], "dynamic_lora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback: the penalty before, shares and pruning after each optimizer step."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the remaining components.

        Raises:
            SelectionError: More remain than the budget allows: the method did not run to its end.
        """
        self._plan = export_triplets(model, self._plan, budget=self._low, name="dynamic_lora")
        self._mask = None
        self._remove_watch()
        return model

    def begin(self, total_steps: int) -> None:
        """Check that the training takes the steps that the schedule was made for.

        Raises:
            OptionError: The training takes more or fewer.
        """
        require_steps("dynamic_lora", self._total, total_steps)
        self._remove_watch()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Add the gradient of the penalty: of Var(v) over the d entries of v it is 2·(v − mean)/(d − 1)."""
        if step > self._last:
            return
        weight = self._options.variance_weight / (2 * self._high)
        for layer in self._layers.values():
            for matrix, entries in ((layer.lora_A["default"], 1), (layer.lora_B["default"], 0)):
                if matrix.grad is not None:
                    centred = matrix - matrix.mean(dim=entries, keepdim=True)
                    matrix.grad += weight * 2 * centred / (matrix.shape[entries] - 1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Average the shares; prune at the steps of the schedule."""
        self._remove_watch()
        beta = self._options.beta
        for name, layer in self._layers.items():
            self._shares[name] = beta * self._shares[name] + (1 - beta) * shares(layer).cpu()
        if step > self._last:
            assert self._mask is not None, "the last pruning comes at the end of the window"
        else:
            count = self._pruned(step)
            self._mask = None if count is None else from_first(lambda: _all_but(self._shares, count))
        for name, mask in (self._mask or {}).items():
            switch_off(self._layers[name], mask)

    def state(self) -> dict[str, Tensor]:
        """Return the average shares, and the mask."""
        kinds = {"share": self._shares, "mask": self._mask or {}}
        return {f"{kind} {name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the averages and the mask."""
        named = [(key.partition(" "), tensor) for key, tensor in state.items()]
        self._shares = {name: tensor for (kind, _, name), tensor in named if kind == "share"}
        self._mask = {name: tensor for (kind, _, name), tensor in named if kind == "mask"} or None

    def _pruned(self, step: int) -> int | None:
        """Return how many components are pruned after ``step``; None at a step that does not prune.

        m = n·(r_s − r)·(P/P_max)³, at least 1, with P steps since the beginning of the window of P_max steps.
        """
        since, window = step - self._first, self._last - self._first
        if since < 0 or (since < window and since % self._options.interval):
            return None
        return max(1, int((self._high - self._low) * (min(since, window) / window) ** 3))


def shares(layer: Any) -> Tensor:
    """Return each component's share ‖b_j‖·‖a_j‖·|c_j| / ‖B·diag(c)·A‖_F of its site's update, (r,).

    ‖B·diag(c)·A‖² = Σ_jk c_j·c_k·⟨b_j, b_k⟩·⟨a_j, a_k⟩ needs no matrix of size out × in.
    """
    a, b, c = (m["default"].detach().float() for m in (layer.lora_A, layer.lora_B, layer.lora_E))
    c = c.flatten()
    whole = (torch.outer(c, c) * (b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
    return b.norm(dim=0) * a.norm(dim=1) * c.abs() / (whole + 1e-8)


def _all_but(shares: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return masks without the ``count`` smallest shares of all, and without those equal to the largest of these."""
    threshold = torch.cat(list(shares.values())).kthvalue(count).values
    return {name: values > threshold for name, values in shares.items()}
