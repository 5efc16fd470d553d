"""DoRA (Liu et al. 2024, arXiv:2402.09353), PEFT's own: W0 + s·B·A in direction, its columns' norms trained beside it.

It ends as PEFT's DoRA checkpoint: ‖W0 + s·B·A‖ is no sum of W0 and a product, so that plain LoRA cannot hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan, base_model_name, make_plan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build() -> Method:
    """Return the method; it has no options. ``use_dora`` of the budget trains DoRA under any method that chooses."""
    return ChoosingMethod(_choose)


def _choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
    sites = find_sites(model, lora).sites
    dora = copy(lora)
    dora.use_dora = True
    return make_plan(sites, dora, [site.name for site in sites], rule="dora", base_model=base_model_name(model))
