"""K random sites (the paper's RLoRA, Table 7): the control that every selection has to beat."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.sites import adapter_parameters, find_sites
from weightlora.plan.budget import Keep, read_budget
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(*, keep: Keep = 0.5, seed: int = 0) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`.
        seed: Decides the sites.
    """
    return ChoosingMethod(partial(_choose, keep, seed))


def _choose(
    keep: Keep, seed: int, model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int
) -> AdapterPlan:
    found = find_sites(model, lora)
    sites = found.sites
    budget = read_budget(keep, adapter_parameters(sites, lora))
    generator = random.Random(seed)
    drawn = budget.choose([generator.random() for _ in sites])
    return make_plan(
        sites,
        lora,
        [sites[i].name for i in drawn],
        rule="random",
        options={"keep": keep},
        seed=seed,
        base_model=base_model_name(model),
        target_parameters=found.parameters,
    )
