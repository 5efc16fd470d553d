"""NoRA (Lin et al. 2024, arXiv:2408.10280): a small adapter between frozen outer factors taken from W0.

ΔW = s·B·(B'·A')·A: A (n, in) and B (out, n) are W0's n largest singular triplets, frozen. A' (r, n) and B' (n, r) are
trained, B' from zero. B·B' and A'·A are LoRA of rank r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from weightlora.errors import OptionError
from weightlora.methods.base import ExpandedMethod, Start, uniform_plan
from weightlora.methods.families.export import singular_factors
from weightlora.validation import Count

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan


@dataclass(kw_only=True, eq=False)
class Nora(ExpandedMethod):
    """NoRA, whose inner rank is the budget's.

    Args:
        outer_r: n, rank of the frozen factors, limited at each site by its shape. None: 4·r. A larger n reaches more
            directions and trains more numbers, 2·r·n for each site.
    """

    outer_r: Count | None = None

    def _planned(self, start: Start) -> AdapterPlan:
        lora = start.lora
        n = 4 * lora.r if self.outer_r is None else self.outer_r
        if n < lora.r:
            raise OptionError(f"outer_r={n} is not allowed: give at least the inner rank r={lora.r}")
        return uniform_plan(start, r=lora.r, alpha=lora.lora_alpha, rule="nora", options={"outer_r": n})

    def _change(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            outer_a, outer_b = singular_factors(layer, slice(self._plan.options["outer_r"]))
            register_parametrization(layer.lora_A["default"], "weight", InnerA(outer_a))
            register_parametrization(layer.lora_B["default"], "weight", InnerB(outer_b))


build = Nora


class InnerA(nn.Module):
    """The weight A'·A with a frozen A (n, in)."""

    def __init__(self, outer: Tensor) -> None:
        super().__init__()
        self.outer: Tensor
        self.register_buffer("outer", outer)

    def forward(self, inner: Tensor) -> Tensor:
        """(r, n) → (r, in)."""
        return inner @ self.outer.to(inner.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return A' at the start: PEFT's A is uniform within 1/√in, A' has n inputs."""
        n, inputs = self.outer.shape
        return weight[:, :n] * (inputs / n) ** 0.5


class InnerB(nn.Module):
    """The weight B·B' with a frozen B (out, n)."""

    def __init__(self, outer: Tensor) -> None:
        super().__init__()
        self.outer: Tensor
        self.register_buffer("outer", outer)

    def forward(self, inner: Tensor) -> Tensor:
        """(n, r) → (out, r)."""
        return self.outer.to(inner.dtype) @ inner

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return B' at the start: zero."""
        return weight.new_zeros(self.outer.shape[1], weight.shape[1])
