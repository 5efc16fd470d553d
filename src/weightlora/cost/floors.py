"""How deep the adapters of a model that is not loaded may reach, and what that takes in a training with a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.cost.estimate import MakeLoss
from weightlora.cost.memory import Known, Memory, Setting, count_step, weight_bytes
from weightlora.errors import OptionError
from weightlora.model.frozen_prefix import find_blocks
from weightlora.model.layers import unchecked_patterns
from weightlora.model.modules import is_linear, output_head, shape_of
from weightlora.model.sites import find_sites
from weightlora.plan.limits import FLOORS, floors_of, run_time
from weightlora.plan.make import make_plan


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
