"""K random sites (the paper's RLoRA, Table 7): the control that every selection has to beat."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method, plan_of
from weightlora.model.sites import find_sites
from weightlora.plan.limits import Limits
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.allocate import site_budget

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(*, adapters: float | None = None, parameters: float | None = None, seed: int = 0) -> Method:
    """Return the method.

    Args:
        adapters: At most so many adapters, or this share of them; half where neither limit is given.
        parameters: At most so many parameters of whole adapters, or this share of LoRA's.
        seed: Decides the sites.
    """
    limits = Limits(adapters=adapters, parameters=parameters)

    def choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
        found = find_sites(model, lora)
        generator = random.Random(seed)
        budget = site_budget(found.sites, lora, limits)
        drawn = budget.choose([generator.random() for _ in found.sites])
        kept = [found.sites[i].name for i in drawn]
        return plan_of(model, lora, found, kept, rule="random", options=limits.limits.asked, seed=seed)

    return ChoosingMethod(choose)
