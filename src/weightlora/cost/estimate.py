"""Parameters, bytes and step time of training a plan, compared with plain LoRA and WeightLoRA+."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.cost.saved_bytes import ADAMW_COPIES, parameter_cost, saved_cost
from weightlora.cost.step_time import step_seconds
from weightlora.fast.enable import enable_fast_lora
from weightlora.fast.step import Dropout
from weightlora.model.restore import untouched
from weightlora.plan.plan import AdapterPlan

#: Tokens of a timed step; the ratio to plain LoRA hardly depends on the number of rows.
TIMED_TOKENS = 1024
MakeLoss = Callable[[nn.Module, int], Tensor]
"""``make_loss(model, rows)`` makes a batch of so many rows and returns its loss."""


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
