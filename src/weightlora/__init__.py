"""LoRA that spends its budget where it counts.

    plan = weightlora.select(model, batches, lora=LoraConfig(r=8, lora_alpha=16), keep=0.5)
    model = plan.attach(model)                 # WeightLoRA: stock PEFT from here on
    model = plan.expand().attach(model)        # WeightLoRA+: the same budget as plain LoRA

Names are imported when they are first used, so that ``weightlora --help`` loads neither torch nor peft.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlora.applied import method_for
    from weightlora.checkpointing import shorten_backward
    from weightlora.errors import WeightLoraError, WeightLoraWarning
    from weightlora.fast_lora import disable_fast_lora, enable_fast_lora
    from weightlora.methods import METHODS, Method, make_method
    from weightlora.plan import AdapterPlan
    from weightlora.selection import select
    from weightlora.sites import Site, find_sites
    from weightlora.trainer import select_for

__version__ = "0.1.0"

_HOMES = {
    "AdapterPlan": "plan",
    "METHODS": "methods",
    "Method": "methods",
    "Site": "sites",
    "WeightLoraError": "errors",
    "WeightLoraWarning": "errors",
    "disable_fast_lora": "fast_lora",
    "enable_fast_lora": "fast_lora",
    "find_sites": "sites",
    "make_method": "methods",
    "method_for": "applied",
    "select": "selection",
    "select_for": "trainer",
    "shorten_backward": "checkpointing",
}

__all__ = [
    "METHODS",
    "AdapterPlan",
    "Method",
    "Site",
    "WeightLoraError",
    "WeightLoraWarning",
    "disable_fast_lora",
    "enable_fast_lora",
    "find_sites",
    "make_method",
    "method_for",
    "select",
    "select_for",
    "shorten_backward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weightlora' has no attribute {name!r}")
    return getattr(import_module(f"weightlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
