"""What training costs: a plan against plain LoRA and WeightLoRA+, or all methods of a model that is not loaded.

Of a plan, parameters, bytes and step time; of a model that is not loaded, the memory of each method, and how deep its
adapters may reach in a training with a store.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.cost.memory import Known, MakeLoss, Memory, Setting, count_step, weight_bytes
from weightlora.cost.saved_bytes import ADAMW_COPIES, parameter_cost, saved_cost
from weightlora.cost.step_time import step_seconds
from weightlora.errors import OptionError
from weightlora.fast.enable import enable_fast_lora
from weightlora.fast.step import Dropout
from weightlora.model.frozen_prefix import find_blocks
from weightlora.model.layers import unchecked_patterns
from weightlora.model.modules import is_linear, output_head, shape_of
from weightlora.model.restore import untouched
from weightlora.model.sites import Candidates, find_sites
from weightlora.plan.budget import Budget
from weightlora.plan.limits import FLOORS, Limits, floors_of, run_time
from weightlora.plan.plan import AdapterPlan, make_plan

#: Tokens of a timed step; the ratio to plain LoRA hardly depends on the number of rows.
TIMED_TOKENS = 1024


@dataclass(frozen=True)
class EstimateLine:
    """One line of the comparison."""

    name: str
    sites: int
    parameters: int
    """All trained parameters, including a head."""
    optimizer_bytes: int
    """AdamW's two moments."""
    saved_bytes: int
    """Bytes saved for the backward pass, each storage once."""
    memory_bytes: int
    """Parameters, gradients, optimizer and saved bytes, without the frozen weights."""
    step_ratio: float
    """Step time ÷ step time of plain LoRA in stock PEFT: the median over the rounds."""
    step_range: tuple[float, float]
    """The smallest and the largest ratio of a round."""


def plain_lora(plan: AdapterPlan) -> AdapterPlan:
    """Return the plan of plain LoRA on all candidates of ``plan``."""
    return replace(plan, entries=tuple(replace(e, r=e.lora_r, alpha=e.lora_alpha) for e in plan.entries))


def estimate(
    plan: AdapterPlan,
    model: nn.Module,
    make_loss: MakeLoss,
    *,
    rows: int,
    length: int,
    fast: Dropout | None = None,
    rounds: int = 3,
) -> list[EstimateLine]:
    """Return a line each for plain LoRA, the plan and WeightLoRA+; ``model`` is left unchanged.

    Bytes are exact for the batch and need no arithmetic; what the fast step's dropout saves is an expected number.
    Timed steps have about ``TIMED_TOKENS`` tokens, one variant after the other in each round.

    Args:
        plan: Made for ``model``.
        model: The base model.
        make_loss: See :data:`MakeLoss`.
        rows: Rows of the batch.
        length: Tokens of a row.
        fast: The ``dropout`` of :func:`weightlora.enable_fast_lora`: three more lines, with that step.
        rounds: Timed rounds; each gives a ratio to plain LoRA.

    Raises:
        PlanMismatchError: The plan was made for another model.
    """
    plans = {"LoRA": plain_lora(plan), "plan": plan, "WeightLoRA+": plan.expand()}
    variants: dict[str, tuple[AdapterPlan, Dropout | None]] = {name: (plans[name], None) for name in plans}
    if fast is not None:
        variants |= {f"{name}, fast": (plans[name], fast) for name in plans}
    timed_rows = max(1, min(rows, TIMED_TOKENS // length))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    counts: dict[str, Mapping[str, int]] = {}
    for _ in range(rounds):
        for name, (variant, step) in variants.items():
            with untouched(model, seed=0), torch.enable_grad():
                attached = variant.attach(model, init_lora_weights=True).train()  # PiSSA would change the base
                if step is not None:
                    enable_fast_lora(attached, step)
                if name not in counts:
                    counts[name] = _count(attached, make_loss, rows)
                seconds[name].append(statistics.median(step_seconds(attached, lambda: [make_loss(model, timed_rows)])))
    lines: list[EstimateLine] = []
    for name, (variant, _) in variants.items():
        ratios = [time / lora for time, lora in zip(seconds[name], seconds["LoRA"], strict=True)]
        spread = {"step_ratio": statistics.median(ratios), "step_range": (min(ratios), max(ratios))}
        lines.append(EstimateLine(name, len(variant.names), **counts[name], **spread))  # pyright: ignore[reportArgumentType]
    return lines


def _count(attached: nn.Module, make_loss: MakeLoss, rows: int) -> dict[str, int]:
    trained: int = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    in_bytes = parameter_cost(attached).of_all

    def losses() -> Any:
        yield make_loss(attached, rows)

    saved = saved_cost(attached, losses, fake=True).of_all
    return {
        "parameters": trained,
        "optimizer_bytes": in_bytes * 2 // ADAMW_COPIES,
        "saved_bytes": saved,
        "memory_bytes": in_bytes + saved,
    }


# -- a model that is not loaded ----------------------------------------------------------------------------------------


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


# -- floors, in a training with a store --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FloorLine:
    """LoRA on all sites above a floor."""

    name: str
    """The share of the depth that lies below."""
    sites: int
    time: float
    """Of the whole training with a store, relative to LoRA on all sites, by the products with weights alone."""
    offloaded: int
    """Bytes of the weights below the floor, which leave the device after the first epoch."""
    memory: Memory
    """Of a later step, without the offloaded weights."""
    store: int
    """Bytes of the hidden states of all rows."""


def compare_floors(
    make_model: Callable[[], nn.Module],
    make_loss: MakeLoss,
    lora: LoraConfig,
    setting: Setting,
    *,
    tokens: int,
    epochs: float,
) -> list[FloorLine]:
    """Return a line for LoRA on all sites, and one for each of :data:`weightlora.plan.limits.FLOORS`.

    Args:
        make_model: Makes the base model on the meta device.
        make_loss: Makes a batch of so many rows and returns its loss.
        lora: Plain LoRA.
        setting: How all of them are trained.
        tokens: Of all rows together, without padding.
        epochs: How often each row is seen.

    Raises:
        OptionError: The model has no list of transformers' blocks, or several devices share it.
        SiteError: ``lora`` matches no layer.
    """
    if setting.shards > 1:
        raise OptionError("a store needs the whole model on each device; leave --fsdp or --store out")
    model: Any = make_model()
    where, blocks = find_blocks(model)
    sites = find_sites(model, lora).sites
    embedded: Any = model.get_input_embeddings()
    stored = tokens * model.config.get_text_config().hidden_size * embedded.weight.dtype.itemsize
    each = [float(_products(block)) for block in blocks]
    rest = 2.0 * _products(output_head(model))
    lines: list[FloorLine] = []
    known: Known = ({}, set())
    for name, floor in zip(("0", *FLOORS), (0, *floors_of(len(blocks))), strict=True):
        own = make_model()
        away = sum(map(weight_bytes, list(find_blocks(own)[1])[:floor]))
        below = tuple(f"{where}.{k}." for k in range(floor))
        kept = [site.name for site in sites if not site.name.startswith(below)]
        config: Any = make_plan(sites, lora, kept).to_lora_config()
        with torch.device("meta"), unchecked_patterns():
            attached = get_peft_model(own, config)  # pyright: ignore[reportArgumentType]
        whole = count_step(attached, make_loss, setting, known=known).memory()
        memory = replace(whole, weights=whole.weights - away, peak=whole.peak - away)
        time = run_time(floor, epochs, each, each, rest=rest) / run_time(0, epochs, each, each, rest=rest)
        lines.append(FloorLine(name, len(kept), time, away, memory, stored if floor else 0))
    return lines


def _products(module: nn.Module | None) -> int:
    """Multiplications with weights for each token."""
    layers = [] if module is None else [each for each in module.modules() if is_linear(each)]
    return sum(a * b for a, b in map(shape_of, layers))
