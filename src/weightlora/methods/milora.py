"""MiLoRA (Wang et al. 2024, arXiv:2406.09044): trains the smallest singular triplets of W0.

W = W_p + s·B·A starts at s·B0·A0 = W0 − W_p, the sum of the r smallest triplets. The base keeps W0, so the adapter adds
s·(B·A − B0·A0): LoRA of rank 2r, of which one half is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from weightlora.errors import OptionError
from weightlora.methods.base import ExpandedMethod, Start, uniform_plan
from weightlora.methods.families.export import singular_factors
from weightlora.model.sites import Site
from weightlora.validation import Count

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan


@dataclass(kw_only=True, eq=False)
class Milora(ExpandedMethod):
    """MiLoRA, which exports twice the rank that it trains.

    Args:
        r: Trained rank; the exported rank is 2r. None: half of the budget's rank, rounded down. The budget's rank
            itself is the paper's method, and twice the budget.
    """

    r: Count | None = None

    def _planned(self, start: Start) -> AdapterPlan:
        lora = start.lora
        if self.r is None and lora.r < 2:
            raise OptionError(
                f"milora exports twice the rank that it trains, and r={lora.r} cannot be halved; raise lora.r to 2, or "
                "give the method r=1, over the budget"
            )
        rank = lora.r // 2 if self.r is None else self.r
        _require_triplets(start.sites, rank)
        alpha = lora.lora_alpha * 2 * rank / lora.r  # the scale s is plain LoRA's
        return uniform_plan(start, r=2 * rank, alpha=alpha, rule="milora", options={"r": rank})

    def _change(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            root = layer.scaling["default"] ** 0.5
            a, b = (factor / root for factor in singular_factors(layer, slice(-self._plan.options["r"], None)))
            register_parametrization(layer.lora_A["default"], "weight", Halves(a, dim=0, sign=1))
            register_parametrization(layer.lora_B["default"], "weight", Halves(b, dim=1, sign=-1))


build = Milora


class Halves(nn.Module):
    """A weight of two halves: X, trained from X0, and a frozen ±X0.

    Args:
        start: X0.
        dim: The dimension along which the halves are concatenated.
        sign: The sign of the frozen half.
    """

    def __init__(self, start: Tensor, *, dim: int, sign: int) -> None:
        super().__init__()
        self.dim, self.sign = dim, sign
        self.start: Tensor
        self.register_buffer("start", start)

    def forward(self, trained: Tensor) -> Tensor:
        """(r, in) → (2r, in), or (out, r) → (out, 2r)."""
        return torch.cat((trained, self.sign * self.start.to(trained.dtype)), dim=self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return X at the start: X0."""
        return self.start.to(weight.dtype, copy=True)


def _require_triplets(sites: Sequence[Site], rank: int) -> None:
    for site in sites:
        there = min(site.in_features, site.out_features)
        if rank > there:
            raise OptionError(
                f"r={rank} is not allowed: {site.name} ({site.in_features}→{site.out_features}) has {there} singular "
                "triplets; lower r, or leave the site out of target_modules"
            )
