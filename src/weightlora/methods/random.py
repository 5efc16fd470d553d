"""K random sites (the paper's RLoRA, Table 7): the control that every selection has to beat."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method, plan_of
from weightlora.model.sites import adapter_parameters, find_sites
from weightlora.plan.budget import Keep, read_budget
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(*, keep: Keep = 0.5, seed: int = 0) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`.
        seed: Decides the sites.
    """

    def choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
        found = find_sites(model, lora)
        generator = random.Random(seed)
        budget = read_budget(keep, adapter_parameters(found.sites, lora))
        drawn = budget.choose([generator.random() for _ in found.sites])
        kept = [found.sites[i].name for i in drawn]
        return plan_of(model, lora, found, kept, rule="random", options={"keep": keep}, seed=seed)

    return ChoosingMethod(choose)
