"""Plain LoRA on every candidate site (Hu et al. 2021): the budget of all other methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method, plan_of
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build() -> Method:
    """Return the method; it has no options."""
    return ChoosingMethod(_choose)


def _choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
    return plan_of(model, lora, find_sites(model, lora), rule="lora")
