"""A plan and PEFT: its ``LoraConfig``, its adapters in a model, and whether a model has what the plan says."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, PlanError, PlanMismatchError
from weightlora.model.sites import Site, all_modules, linear_sites, named_parameters, trained_modules
from weightlora.plan._data import PlanData, whole_or_float

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

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


def lora_config_of(plan: PlanData, overrides: Mapping[str, Any]) -> LoraConfig:
    """Return the stock PEFT config of ``plan``; see :meth:`weightlora.AdapterPlan.to_lora_config`."""
    from weightlora.model.layers import SortedLoraConfig

    taken = sorted(set(overrides) & {*_PLANNED_FIELDS, *_CHOOSING_FIELDS, "target_parameters"})
    if taken:
        raise OptionError(f"{', '.join(taken)} come from the plan; change them with the limits of select()")
    kept = [entry for entry in plan.entries if entry.r > 0]
    if not kept:
        raise PlanError("the plan keeps no site, so it has no LoraConfig; select anew with larger limits")
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


def attach_plan(plan: PlanData, model: nn.Module, overrides: Mapping[str, Any]) -> PeftModel:
    """Return a PEFT model with new adapters on the planned sites; see :meth:`weightlora.AdapterPlan.attach`."""
    from peft import PeftModel, get_peft_model

    from weightlora.model.checkpointing import shorten_backward
    from weightlora.model.gathering import ready_for_adapters, why_not_attachable
    from weightlora.model.layers import take_tuner, unchecked_patterns, without_adapters
    from weightlora.model.restore import restored_on_error

    require_sites(plan, model)
    config: Any = lora_config_of(plan, overrides)
    _require_room(model, config)
    reason = why_not_attachable(model, config)
    if reason is not None:
        raise OptionError(reason)
    with restored_on_error(model):
        try:
            base = without_adapters(model)
            with unchecked_patterns(), ready_for_adapters(base, trained_modules(config)):
                peft_model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
        except ValueError as error:  # other fields leave none of the names
            text = " ".join(str(error).split())
            raise PlanMismatchError(f"PEFT cannot attach the plan: {text}; change the fields in lora") from error
        peft_model.peft_config["default"].target_modules = set(plan.names)  # pyright: ignore[reportAttributeAccessIssue]
        require_adapters(plan, peft_model)
        if isinstance(model, PeftModel):
            take_tuner(model, peft_model)
    return shorten_backward(model if isinstance(model, PeftModel) else peft_model)


def require_sites(plan: PlanData, model: nn.Module) -> None:
    """Raise unless each site and target parameter of ``plan`` is in ``model`` with the same shape.

    Raises:
        PlanMismatchError: With those that do not match.
    """
    other_model = f"the plan was made for another model ({plan.base_model or 'unnamed'})"
    present = {site.name: site for site in linear_sites(model)}
    faults = [
        f"{site.name}: not in the model"
        if site.name not in present
        else f"{site.name}: {_shape(present[site.name])} in the model, {_shape(site)} in the plan"
        for site in (entry.site for entry in plan.entries)
        if present.get(site.name) != site
    ]
    _raise_faults(faults, other_model)
    if plan.target_parameters:
        shapes = named_parameters(all_modules(model), [each.name for each in plan.target_parameters])
        faults = [
            f"{each.name}: {shapes.get(each.name, 'not')} in the model, {each.shape} in the plan"
            for each in plan.target_parameters
            if shapes.get(each.name) != each.shape
        ]
        _raise_faults(faults, other_model)


def require_adapters(plan: PlanData, model: nn.Module, adapter: str = "default") -> None:
    """Raise unless exactly the planned sites and parameters carry ``adapter`` in ``model``, each with its rank.

    Raises:
        PlanMismatchError: With those that do not match.
    """
    from weightlora.model.layers import adapter_ranks

    require_sites(plan, model)
    found = adapter_ranks(model, adapter)
    planned = {name: plan.ranks[name] for name in plan.names} | {each.name: each.r for each in plan.target_parameters}
    faults = [f"{name}: no adapter, planned rank {planned[name]}" for name in planned if name not in found]
    faults += [f"{name}: rank {found[name]}, not planned" for name in found if name not in planned]
    both = [name for name in planned if name in found]
    faults += [f"{n}: rank {found[n]}, planned {planned[n]}" for n in both if found[n] != planned[n]]
    _raise_faults(faults, "the model does not carry the plan (use plan.attach(model))")


def _require_room(model: nn.Module, config: LoraConfig) -> None:
    """Raise unless adapters of ``config`` can be put into ``model`` and trained, without losing any that it carries.

    Raises:
        OptionError: With the adapters, and what to do.
        SiteError: A weight has no values, or autograd cannot use it.
    """
    from peft import PeftModel

    from weightlora.model.gathering import require_loaded
    from weightlora.model.layers import require_peft_wrapper, require_replaceable

    require_loaded(model)
    require_peft_wrapper(model)
    if not isinstance(model, PeftModel):
        return
    found = require_replaceable(model, "attach the plan to the base model (model.unload())")
    if len(model.peft_config) > 1:
        raise OptionError(
            f"the model has adapters {', '.join(model.peft_config)}, and the plan replaces 'default' alone; delete the "
            "others (model.delete_adapter), or attach the plan to the base model"
        )
    if found.task_type != config.task_type:
        raise OptionError(
            f"the model was wrapped with task_type={found.task_type!s}, the plan has {config.task_type!s}; give "
            "select() the model's own LoraConfig, or attach the plan to the base model"
        )


def _exclusions(plan: PlanData, users: str | Collection[str] | None) -> str | list[str] | None:
    """The user's ``exclude_modules``, and the dropped sites that PEFT would match by a kept name.

    PEFT reads a listed name as an ending: a kept ``proj`` would also adapt a dropped ``inner.proj``.
    """
    ends = tuple("." + name for name in plan.names)
    matched = [entry.site.name for entry in plan.entries if entry.r == 0 and entry.site.name.endswith(ends)]
    if isinstance(users, str):
        return "|".join([f"(?:{users})", *map(re.escape, matched)]) if matched else users
    return sorted({*(users or ()), *matched}) or None


def _raise_faults(faults: Sequence[str], what: str) -> None:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise PlanMismatchError(f"{what}: {'; '.join(faults[:5])}{more}")


def _shape(site: Site) -> str:
    return f"{site.in_features}→{site.out_features}"
