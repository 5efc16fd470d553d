"""WeightLoRA+: the survivors get the rank that the dropped sites freed (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from weightlora.methods.base import ChoosingMethod, Method
from weightlora.plan.budget import Keep, warmup_steps
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.select import select

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(
    *,
    keep: Keep = 0.5,
    steps: int | None = None,
    seed: int = 0,
    alpha: Literal["scale", "keep"] = "scale",
    **options: Any,
) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`; the paper has n/2.
        steps: T; None stands for 0.5 % of the training's steps, at least 20.
        seed: As in :func:`weightlora.select`.
        alpha: As in :meth:`weightlora.AdapterPlan.expand`.
        options: Further arguments of :func:`weightlora.select`: rule, head_steps, lr, ...
    """

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan:
        t = warmup_steps(total_steps) if steps is None else steps
        return select(model, batches, lora=lora, keep=keep, steps=t, seed=seed, **options).expand(alpha=alpha)

    return ChoosingMethod(choose)
