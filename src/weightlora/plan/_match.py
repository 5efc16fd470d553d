"""Whether a model has the sites of a plan, and carries its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightlora.errors import OptionError, PlanMismatchError
from weightlora.model.parameters import TargetParameter, named_parameters
from weightlora.model.sites import Site, all_modules, linear_sites

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def require_sites(model: nn.Module, sites: Sequence[Site], base_model: str | None) -> None:
    """Raise unless each of ``sites`` is a linear layer of ``model`` with the same shape.

    Raises:
        PlanMismatchError: With the sites that do not match.
    """
    present = {site.name: site for site in linear_sites(model)}
    faults = [
        f"{site.name}: not in the model"
        if site.name not in present
        else f"{site.name}: {_shape(present[site.name])} in the model, {_shape(site)} in the plan"
        for site in sites
        if present.get(site.name) != site
    ]
    _raise_faults(faults, f"the plan was made for another model ({base_model or 'unnamed'})")


def require_parameters(model: nn.Module, parameters: Sequence[TargetParameter], base_model: str | None) -> None:
    """Raise unless each of ``parameters`` is in ``model`` with the same shape.

    Raises:
        PlanMismatchError: With those that are not.
    """
    if not parameters:
        return
    present = named_parameters(all_modules(model), [each.name for each in parameters])
    faults = [
        f"{each.name}: {present.get(each.name, 'not')} in the model, {each.shape} in the plan"
        for each in parameters
        if present.get(each.name) != each.shape
    ]
    _raise_faults(faults, f"the plan was made for another model ({base_model or 'unnamed'})")


def require_room(model: nn.Module, config: LoraConfig) -> None:
    """Raise unless adapters of ``config`` can be put into ``model`` and trained, without losing any that it carries.

    Raises:
        OptionError: With the adapters, and what to do.
        SiteError: A weight has no values, or autograd cannot use it.
    """
    from peft import PeftModel

    from weightlora.model.layers import require_peft_wrapper, require_replaceable
    from weightlora.model.weights import require_loaded

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


def require_adapters(model: nn.Module, planned: Mapping[str, int], adapter: str) -> None:
    """Raise unless exactly the sites of ``planned`` carry ``adapter`` in ``model``, each with its rank.

    Raises:
        PlanMismatchError: With the sites that do not match.
    """
    from weightlora.model.layers import adapter_ranks

    found = adapter_ranks(model, adapter)
    faults = [f"{name}: no adapter, planned rank {planned[name]}" for name in planned if name not in found]
    faults += [f"{name}: rank {found[name]}, not planned" for name in found if name not in planned]
    both = [name for name in planned if name in found]
    faults += [f"{n}: rank {found[n]}, planned {planned[n]}" for n in both if found[n] != planned[n]]
    _raise_faults(faults, "the model does not carry the plan (use plan.attach(model))")


def _raise_faults(faults: Sequence[str], what: str) -> None:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise PlanMismatchError(f"{what}: {'; '.join(faults[:5])}{more}")


def _shape(site: Site) -> str:
    return f"{site.in_features}→{site.out_features}"
