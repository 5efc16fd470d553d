"""Dynamic LoRA (Mao et al. 2024, "DoRA", arXiv:2405.17357; not PEFT's DoRA): prunes components with a small share.

ΔW = s·Σ_j c_j·b_j·a_j, and a component's share of its site's update is s_j = ‖b_j‖·‖a_j‖·|c_j| / ‖B·diag(c)·A‖. The
components with the smallest average shares, over all sites together, are set to 0. How many follows a cubic curve in a
window of the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.methods.base import Start, recorded
from weightlora.methods.families.moving import Attached, packed, require_window, unpacked, window
from weightlora.methods.families.triplets import Alpha, TripletMethod
from weightlora.model.distributed import from_first
from weightlora.validation import Count, NotNegative, Share

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True, eq=False)
class DynamicLora(TripletMethod):
    """Dynamic LoRA.

    Args:
        init_r: Components of a site at the start. None: 1.5·r, rounded up.
        begin: Share of the training before the first pruning.
        end: Share of the training after which the ranks are final.
        interval: Steps between prunings. In between, pruned components may return.
        beta: Decay of the average shares.
        variance_weight: η of the penalty on the variance of the entries of a_j and b_j, until the ranks are final.
        alpha: ``"scale"`` scales every rank by alpha/r as in plain LoRA, ``"keep"`` by alpha/init_r.

    Raises:
        OptionError: ``begin`` does not come before ``end``.
    """

    init_r: Count | None = None
    begin: float = 0.15
    end: float = 0.5
    interval: Count = 100
    beta: Share = 0.9
    variance_weight: NotNegative = 0.1
    alpha: Alpha = "scale"
    name = "dynamic_lora"

    def __post_init__(self) -> None:
        require_window(self.begin, self.end)

    def most_ranks(self, step: int) -> int:
        """Return the starting ranks minus those that the curve prunes; all of them at steps that do not prune."""
        return self._high - (self._pruned(step) or 0)

    def _start(self, start: Start) -> Attached:
        init_r = math.ceil(1.5 * start.lora.r) if self.init_r is None else self.init_r
        self._first, self._last = window(self.begin, self.end, self._total)
        self._init_r, self._high = init_r, len(start.sites) * init_r
        return self._triplets(start, init_r, recorded(self, init_r=init_r), orth_reg_weight=0.0)

    def _ready(self) -> None:
        """Start A and B uniform."""
        for layer in self._layers.values():
            for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
                torch.nn.init.kaiming_uniform_(matrix)
        self._shares = {name: torch.zeros(self._init_r) for name in self._layers}
        self._mask: Mapping[str, Tensor] | None = None

    def _in_force(self) -> Mapping[str, Tensor] | None:
        """Return what the last pruning left; None before the first and between two of them."""
        return self._mask

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Add the gradient of the penalty: of Var(v) over the d entries of v it is 2·(v − mean)/(d − 1)."""
        if step > self._last:
            return
        weight = self.variance_weight / (2 * self._high)
        for layer in self._layers.values():
            for matrix, entries in ((layer.lora_A["default"], 1), (layer.lora_B["default"], 0)):
                if matrix.grad is not None:
                    centred = matrix - matrix.mean(dim=entries, keepdim=True)
                    matrix.grad += weight * 2 * centred / (matrix.shape[entries] - 1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Average the shares; prune at the steps of the schedule."""
        for name, layer in self._layers.items():
            self._shares[name] = self.beta * self._shares[name] + (1 - self.beta) * shares(layer).cpu()
        if step > self._last:
            assert self._mask is not None, "the last pruning comes at the end of the window"
        else:
            count = self._pruned(step)
            self._mask = None if count is None else from_first(lambda: _all_but(self._shares, count))
        for name, mask in (self._mask or {}).items():
            e = self._layers[name].lora_E["default"]
            e.masked_fill_(~mask.to(e.device).unsqueeze(1), 0.0)

    def state(self) -> dict[str, Tensor]:
        """Return the average shares, and the mask."""
        return packed(share=self._shares, mask=self._mask or {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the averages and the mask."""
        self._shares, mask = unpacked(state, "share", "mask")
        self._mask = mask or None

    def _pruned(self, step: int) -> int | None:
        """Return how many components are pruned after ``step``; None at a step that does not prune.

        m = n·(r_s − r)·(P/P_max)³, at least 1, with P steps since the beginning of the window of P_max steps.
        """
        since, window = step - self._first, self._last - self._first
        if since < 0 or (since < window and since % self.interval):
            return None
        return max(1, int((self._high - self._low) * (min(since, window) / window) ** 3))


build = DynamicLora


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
