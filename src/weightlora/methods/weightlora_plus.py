"""WeightLoRA+: WeightLoRA whose kept adapters get the ranks of the dropped ones (paper, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weightlora.methods.families.selecting import GatedMethod
from weightlora.plan.plan import AdapterPlan


@dataclass(kw_only=True, eq=False)
class WeightLoraPlus(GatedMethod):
    """WeightLoRA+.

    Args:
        budget: ``"ranks"``, the paper: r becomes r·n/K, 2r at half of the adapters. Kept layers are often wide, so that
            this can cost more parameters than LoRA. ``"parameters"`` grows them to LoRA's parameters at most.

    Raises:
        OptionError: A value is out of its range.
    """

    budget: Literal["ranks", "parameters"] = "ranks"

    def grown(self, plan: AdapterPlan) -> AdapterPlan:
        """Return the plan at the larger ranks."""
        return plan.expand(self.budget)


build = WeightLoraPlus
