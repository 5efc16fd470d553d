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
    from weightlora.errors import WeightLoraError, WeightLoraWarning
    from weightlora.fast.enable import disable_fast_lora, enable_fast_lora
    from weightlora.methods import METHODS, Method, make_method
    from weightlora.model.checkpointing import shorten_backward
    from weightlora.model.sites import Site, find_sites
    from weightlora.plan.plan import AdapterPlan
    from weightlora.selection.rules import RULES, rule_of
    from weightlora.selection.rules.first_order import FirstOrder
    from weightlora.selection.rules.integrated import Integrated
    from weightlora.selection.rules.stoiht import StoIHT
    from weightlora.selection.select import select, select_trained
    from weightlora.serving.export import export_adapter
    from weightlora.stacks.emit import emit_plan
    from weightlora.trainer.attach import method_for, select_for

__version__ = "0.1.0"

_HOMES = {
    "AdapterPlan": "plan.plan",
    "FirstOrder": "selection.rules.first_order",
    "Integrated": "selection.rules.integrated",
    "METHODS": "methods",
    "Method": "methods",
    "RULES": "selection.rules",
    "Site": "model.sites",
    "StoIHT": "selection.rules.stoiht",
    "WeightLoraError": "errors",
    "WeightLoraWarning": "errors",
    "disable_fast_lora": "fast.enable",
    "emit_plan": "stacks.emit",
    "enable_fast_lora": "fast.enable",
    "export_adapter": "serving.export",
    "find_sites": "model.sites",
    "make_method": "methods",
    "method_for": "trainer.attach",
    "rule_of": "selection.rules",
    "select": "selection.select",
    "select_for": "trainer.attach",
    "select_trained": "selection.select",
    "shorten_backward": "model.checkpointing",
}

__all__ = [
    "METHODS",
    "RULES",
    "AdapterPlan",
    "FirstOrder",
    "Integrated",
    "Method",
    "Site",
    "StoIHT",
    "WeightLoraError",
    "WeightLoraWarning",
    "disable_fast_lora",
    "emit_plan",
    "enable_fast_lora",
    "export_adapter",
    "find_sites",
    "make_method",
    "method_for",
    "rule_of",
    "select",
    "select_for",
    "select_trained",
    "shorten_backward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weightlora' has no attribute {name!r}")
    return getattr(import_module(f"weightlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
