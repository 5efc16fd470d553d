"""A plan and PEFT's ``LoraConfig``: what a plan takes from the user's config, and the config made from a plan."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, PlanError
from weightlora.model.sites import trained_modules

if TYPE_CHECKING:
    from peft import LoraConfig

    from weightlora.plan.plan import AdapterPlan

#: Fields of a LoraConfig that the plan decides; all others are the user's and pass through unchanged.
_PLANNED_FIELDS = ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
#: Fields that chose the candidates; PEFT would take sites of the plan away by them.
_CHOOSING_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")
#: Fields that PEFT fills in by itself when a config is made, attached or saved.
_PEFT_FIELDS = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


def config_fields(lora: LoraConfig) -> dict[str, Any]:
    """The fields of ``lora`` that a plan passes through, as JSON, where they differ from PEFT's defaults."""
    return {k: v for k, v in asked_fields(lora).items() if k not in _PLANNED_FIELDS}


def asked_fields(lora: LoraConfig) -> dict[str, Any]:
    """All fields of ``lora`` that a user sets, as JSON, where they differ from PEFT's defaults."""
    from peft import LoraConfig

    default = LoraConfig().to_dict()
    mine = {k: v for k, v in lora.to_dict().items() if k not in _PEFT_FIELDS and v != default[k]}
    if "modules_to_save" in mine:  # PEFT adds the task's heads to the list each time that it attaches adapters
        heads = trained_modules(replace(lora, modules_to_save=None))
        mine["modules_to_save"] = [name for name in mine["modules_to_save"] if name not in heads]
        mine = {k: v for k, v in mine.items() if k != "modules_to_save" or v}
    return json.loads(json.dumps(mine, default=sorted))  # sets become sorted lists, enums their text


def planned_lora_config(plan: AdapterPlan, overrides: Mapping[str, Any]) -> LoraConfig:
    """Return the stock PEFT config of ``plan``; see :meth:`weightlora.AdapterPlan.to_lora_config`."""
    from weightlora.plan._sorted_config import SortedLoraConfig

    taken = sorted(set(overrides) & {*_PLANNED_FIELDS, *_CHOOSING_FIELDS, "target_parameters"})
    if taken:
        raise OptionError(f"{', '.join(taken)} come from the plan; change them with select(keep=...) or expand()")
    kept = [entry for entry in plan.entries if entry.r > 0]
    if not kept:
        raise PlanError("the plan keeps no site, so it has no LoraConfig; select anew with a larger keep")
    besides = plan.target_parameters
    ranks, alphas = {each.r for each in (*kept, *besides)}, {each.alpha for each in (*kept, *besides)}
    own = {"^" + re.escape(entry.site.name): entry for entry in kept}
    first = [*besides, *kept][0]  # PEFT looks for the keys of patterns among layers, and warns of a parameter's
    own |= {"^" + re.escape(p.name): p for p in besides if (p.r, p.alpha) != (first.r, first.alpha)}
    fields = deepcopy({**plan.lora, **overrides})  # PEFT adds the task's heads to modules_to_save in place
    fields |= {"target_parameters": [each.name for each in besides]} if besides else {}
    unknown = sorted(set(fields) - set(inspect.signature(SortedLoraConfig).parameters))
    if unknown:
        raise PlanError(f"this PEFT's LoraConfig has no field {', '.join(unknown)}; update PEFT, or select anew")
    try:
        config = SortedLoraConfig(
            target_modules=list(plan.names),  # PEFT makes a set of it
            r=first.r,
            lora_alpha=whole_or_float(first.alpha),  # pyright: ignore[reportArgumentType]  # PEFT takes floats as well
            rank_pattern={} if len(ranks) == 1 else {key: e.r for key, e in own.items()},
            alpha_pattern={} if len(alphas) == 1 else {key: whole_or_float(e.alpha) for key, e in own.items()},
            **fields,
        )
    except (ValueError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())
        raise PlanError(f"PEFT refuses the plan's LoraConfig: {text}; change the fields in lora") from error
    config.exclude_modules = _exclusions(plan, config.exclude_modules)
    return config


def whole_or_float(value: Fraction | float) -> float:
    """An int where the value is whole (Ollama reads lora_alpha as one), else a float."""
    return int(value) if float(value).is_integer() else float(value)


def _exclusions(plan: AdapterPlan, users: str | Collection[str] | None) -> str | list[str] | None:
    """The user's ``exclude_modules``, and the dropped sites that PEFT would match by a kept name.

    PEFT reads a listed name as an ending: a kept ``proj`` would also adapt a dropped ``inner.proj``.
    """
    ends = tuple("." + name for name in plan.names)
    matched = [entry.site.name for entry in plan.entries if entry.r == 0 and entry.site.name.endswith(ends)]
    if isinstance(users, str):
        return "|".join([f"(?:{users})", *map(re.escape, matched)]) if matched else users
    return sorted({*(users or ()), *matched}) or None
