"""Stacks that adapt whole types of projections: each in all layers or in none, all with one rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from weightlora.serving.base_model import is_here, read_base

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan

#: Options that such stacks have, by the field.
OPTIONS = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "", "task_type": ""}
#: The parts of an MLP by their names in transformers; such stacks adapt all of them or none.
_MLP = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")


def lacking_type(plan: AdapterPlan, types: Mapping[str, str]) -> str | None:
    """Return what a stack with an option for each type of projection cannot express of a plan, or None.

    Args:
        plan: The plan.
        types: The stack's word for a projection by its name in transformers, without those of the MLP.
    """
    kept = sorted({entry.site.projection for entry in plan.entries if entry.r > 0})
    others = [name for name in kept if name not in (*types, *_MLP)]
    if others:
        return f"adapts only {', '.join((*types, *_MLP))}, and the plan has {', '.join(others[:3])}"
    if any(name in plan.lora for name in ("layers_to_transform", "exclude_modules")):
        return "adapts all layers, and the plan was made for a part of the model"
    sites = _projections(plan)
    for projection in kept:
        of = [name for name, own in sites.items() if own == projection]
        there = sum(plan.ranks.get(name, 0) > 0 for name in of)
        if there < len(of):
            found = f"{projection} in {there} of {len(of)}"
            return f"adapts a projection in all layers or in none, and the plan has {found}"
    mlp = [name for name in kept if name in _MLP]
    if 0 < len(mlp) < len(_MLP):
        return f"adapts the whole MLP or nothing of it, and the plan has only {', '.join(mlp)}"
    return None


def kept_types(names: Collection[str], types: Mapping[str, str]) -> list[str]:
    """Return the stack's words for the projections that ``names`` have, in the stack's order."""
    return [word for projection, word in types.items() if any(name.endswith(f".{projection}") for name in names)]


def has_mlp(names: Collection[str]) -> bool:
    """Whether ``names`` have an MLP."""
    return any(name.endswith(tuple(f".{part}" for part in _MLP)) for name in names)


def _projections(plan: AdapterPlan) -> dict[str, str]:
    """Projection of each site of the plan, and of the base model where that is on this machine, by name."""
    sites = [entry.site for entry in plan.entries]
    if plan.base_model and is_here(plan.base_model):
        sites += read_base(plan.base_model, plan.lora.get("task_type")).layers.values()
    return {site.name: site.projection for site in sites}
