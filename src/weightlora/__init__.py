"""LoRA that spends its budget where it counts.

    plan = weightlora.select(model, batches, lora=LoraConfig(r=8, lora_alpha=16), adapters=0.5)
    model = plan.attach(model)                 # WeightLoRA: stock PEFT from here on
    model = plan.expand().attach(model)        # WeightLoRA+: as many ranks as plain LoRA

Names are imported when they are first used, so that ``weightlora --help`` loads neither torch nor peft. Rules, methods
and what else is built upon are imported from their own modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlora.errors import (
        DataError,
        MissingPackageError,
        OptionError,
        OutputError,
        PlanError,
        PlanMismatchError,
        SelectionError,
        ServingError,
        SiteError,
        StackError,
        WeightLoraError,
        WeightLoraWarning,
    )
    from weightlora.fast.enable import disable_fast_lora, enable_fast_lora
    from weightlora.model.sites import find_sites
    from weightlora.plan.plan import AdapterPlan
    from weightlora.selection.select import select
    from weightlora.serving.check import check
    from weightlora.serving.export import export
    from weightlora.serving.squeeze import squeeze
    from weightlora.stacks.emit import emit
    from weightlora.trainer.attach import method_for, select_for
    from weightlora.trainer.store import store_frozen

__version__ = "0.1.0"

_HOMES = {
    "AdapterPlan": "plan.plan",
    "DataError": "errors",
    "MissingPackageError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "PlanError": "errors",
    "PlanMismatchError": "errors",
    "SelectionError": "errors",
    "ServingError": "errors",
    "SiteError": "errors",
    "StackError": "errors",
    "WeightLoraError": "errors",
    "WeightLoraWarning": "errors",
    "check": "serving.check",
    "disable_fast_lora": "fast.enable",
    "emit": "stacks.emit",
    "enable_fast_lora": "fast.enable",
    "export": "serving.export",
    "find_sites": "model.sites",
    "method_for": "trainer.attach",
    "select": "selection.select",
    "select_for": "trainer.attach",
    "squeeze": "serving.squeeze",
    "store_frozen": "trainer.store",
}

__all__ = [
    "AdapterPlan",
    "DataError",
    "MissingPackageError",
    "OptionError",
    "OutputError",
    "PlanError",
    "PlanMismatchError",
    "SelectionError",
    "ServingError",
    "SiteError",
    "StackError",
    "WeightLoraError",
    "WeightLoraWarning",
    "check",
    "disable_fast_lora",
    "emit",
    "enable_fast_lora",
    "export",
    "find_sites",
    "method_for",
    "select",
    "select_for",
    "squeeze",
    "store_frozen",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weightlora' has no attribute {name!r}")
    return getattr(import_module(f"weightlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
