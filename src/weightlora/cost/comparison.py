"""Memory of full fine-tuning, LoRA, WeightLoRA and WeightLoRA+ for a model that is not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.cost.estimate import MakeLoss
from weightlora.cost.memory import Known, Memory, Setting, count_step
from weightlora.model.layers import unchecked_patterns
from weightlora.model.sites import Candidates, find_sites
from weightlora.plan.budget import Budget
from weightlora.plan.limits import Limits
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan


@dataclass(frozen=True)
class MemoryLine:
    """One line of the comparison."""

    name: str
    sites: int | None
    """Sites that carry an adapter; None for full fine-tuning."""
    memory: Memory
    largest_batch: int | None
    """The most rows that fit the limit; None without a limit."""


def compare_memory(
    make_model: Callable[[], nn.Module],
    make_loss: MakeLoss,
    lora: LoraConfig,
    setting: Setting,
    *,
    adapters: Sequence[float] = (),
    limit: int | None = None,
) -> list[MemoryLine]:
    """Return a line for each method. WeightLoRA has two for each budget: it keeps the upper sites, or the lower ones.

    The backward pass ends at the lowest adapter, so where the sites are decides how much is saved.

    Args:
        make_model: Makes the base model on the meta device. Full fine-tuning is left out if it has no trainable
            parameter, as a quantised one.
        make_loss: Makes a batch of so many rows and returns its loss.
        lora: Plain LoRA.
        setting: How all of them are trained.
        adapters: How many WeightLoRA keeps, as numbers or shares; none are a half, a quarter and a tenth of the sites.
            WeightLoRA+ has the first.
        limit: Bytes of a device, for the largest batch.

    Raises:
        OptionError: A budget is out of its range, or the step cannot be counted.
        SiteError: ``lora`` matches no layer.
    """
    found = find_sites(make_model(), lora)
    lines: list[MemoryLine] = []
    known: Known = ({}, set())
    for name, plan in (("full fine-tuning", None), *_plans(make_model(), found, lora, adapters)):
        model = make_model()
        if plan is not None:
            with torch.device("meta"), unchecked_patterns():
                model = get_peft_model(model, plan.to_lora_config())  # pyright: ignore[reportArgumentType]
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            continue
        step = count_step(model, make_loss, setting, any_rows=limit is not None, known=known)
        rows = None if limit is None else step.largest_batch(limit)
        lines.append(MemoryLine(name, None if plan is None else len(plan.names), step.memory(), rows))
    return lines


def _plans(
    model: nn.Module, found: Candidates, lora: LoraConfig, adapters: Sequence[float]
) -> Iterator[tuple[str, AdapterPlan]]:
    """The name of each line and its plan."""
    n = len(found.sites)
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}  # about the order of the forward
    heights = [float(1 + places[site.name]) for site in found.sites]
    record: Any = {"target_parameters": found.parameters}
    yield "LoRA", make_plan(found.sites, lora, [site.name for site in found.sites], **record)
    plans: list[dict[str, AdapterPlan]] = []
    for k in (Limits(adapters=each).k_of(n) for each in adapters or [max(n // part, 1) for part in (2, 4, 10)]):
        budget = Budget.of_count(k or n, n=n)
        ends = {"upper": heights, "lower": [1 + max(heights) - height for height in heights]}
        kept = {end: [found.sites[i].name for i in budget.choose(sizes)] for end, sizes in ends.items()}
        plans.append({end: make_plan(found.sites, lora, names, **record) for end, names in kept.items()})
    yield from ((f"WeightLoRA {end}", plan) for pair in plans for end, plan in pair.items())
    yield from ((f"WeightLoRA+ {end}", plan.expand()) for end, plan in plans[0].items())
