"""DoRA (Liu et al. 2024, arXiv:2402.09353) as in PEFT: W0 + s·B·A gives the direction, and norms are trained apart.

It ends as PEFT's DoRA checkpoint: a rescaled W0 + s·B·A is not W0 plus a low-rank product, so plain LoRA cannot
represent it.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.methods.base import ChoosingMethod, Method, plan_of
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build() -> Method:
    """Return the method; it has no options. With ``use_dora`` in the LoRA config, any choosing method trains DoRA."""
    return ChoosingMethod(_choose)


def _choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
    if lora.lora_bias:
        raise OptionError("lora_bias=True is not allowed with DoRA, which PEFT gives no bias; leave it out")
    dora = copy(lora)
    dora.use_dora = True
    return plan_of(model, dora, find_sites(model, dora), rule="dora")
