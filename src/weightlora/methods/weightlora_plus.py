"""WeightLoRA+: the kept sites get the rank that the dropped sites freed (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.select import selected
from weightlora.selection.warmup import OPTIONS, Warmup, takes

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@takes(OPTIONS)
def build(**options: Any) -> Method:
    """Return the method.

    Args:
        options: Those of :func:`weightlora.select`. ``keep`` is how much is kept before the ranks grow; the paper keeps
            n/2 adapters.

    Raises:
        OptionError: An argument is out of its range.
    """
    warmup = Warmup(**options)

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan:
        return selected(model, batches, replace(warmup, lora=lora, total_steps=total_steps)).plan.expand()

    return ChoosingMethod(choose)
