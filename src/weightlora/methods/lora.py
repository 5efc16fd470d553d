"""Plain LoRA on every candidate site (Hu et al. 2021): the budget of all other methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.sites import find_sites
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build() -> Method:
    """Return the method; it has no options."""
    return ChoosingMethod(_choose)


def _choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
    found = find_sites(model, lora)
    sites = found.sites
    return make_plan(
        sites,
        lora,
        [site.name for site in sites],
        rule="lora",
        base_model=base_model_name(model),
        target_parameters=found.parameters,
    )
