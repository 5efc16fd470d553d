"""LoRA-drop (Zhou et al. 2025, COLING, arXiv:2402.07721): keeps the adapters with the strongest output.

After a short training, I_i = g_i/Σg with g_i = Σ_x ‖s·B_i·A_i·x‖² over the measured tokens x. The sites with the
largest I keep an adapter of their own; the others have none, or share one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from weightlora.errors import SelectionError
from weightlora.methods.base import PlanningMethod, PreparedPlan, plan_of, recorded
from weightlora.model.distributed import add_up
from weightlora.model.layers import lora_layers
from weightlora.model.restore import evaluated
from weightlora.model.sites import find_sites
from weightlora.plan.limits import Limits
from weightlora.selection.allocate import site_budget
from weightlora.selection.batches import Loss, TokenRows, counted_tokens, cycled, in_parts
from weightlora.selection.stage import Stage, probed, train_adapters
from weightlora.validation import Count, Positive

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


@dataclass(kw_only=True, eq=False)
class LoraDrop(PlanningMethod):
    """LoRA-drop.

    Args:
        adapters: At most so many adapters, or this share of them; half where neither limit is given, Table 1's reading.
        parameters: At most so many parameters of whole adapters, or this share of LoRA's.
        energy: The paper's rule instead of a limit: the fewest sites whose I add up to this share; the paper has 0.9.
        share: All sites that are not kept share one adapter for each shape, as in the paper. The stock checkpoint then
            holds a copy of it for every site.
        steps: Batches to train on and to measure. None: a tenth of the training's steps, at least 20.
        learning_rate: AdamW's learning rate in these steps.
        head_learning_rate: That of a new head; None stands for ``learning_rate``.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.
    """

    adapters: float | None = None
    parameters: float | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    share: bool = False
    steps: Count | None = None
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    seed: int = 0
    loss_fn: Loss | None = None

    def choose(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int, /) -> PreparedPlan:
        """Keep the sites with the strongest outputs; with ``share`` the others share their adapters."""
        found = find_sites(model, lora)
        sites, names = found.sites, [site.name for site in found.sites]
        budget = site_budget(sites, lora, Limits(adapters=self.adapters, parameters=self.parameters))
        steps = max(20, math.ceil(total_steps / 10)) if self.steps is None else self.steps
        rows = itertools.cycle(list(cycled(batches, steps)))  # measured on the training rows
        given: dict[str, Any] = {
            "seed": self.seed,
            "loss_fn": self.loss_fn,
            "head_learning_rate": self.head_learning_rate,
        }
        with probed(model, lora, sites, batches=rows, steps=2 * steps, **given) as stage:
            train_adapters(stage, steps=steps, learning_rate=self.learning_rate)
            strength = _energies(stage, steps)
        shares = (strength / strength.sum()).tolist()
        wanted = budget.choose(shares) if self.energy is None else fewest(shares, self.energy)
        kept = [names[i] for i in wanted if shares[i] > 0]
        if not kept:
            raise SelectionError("no adapter has an output; does the loss depend on the adapted layers?")
        record = {"rule": "lora_drop", "options": recorded(self, steps=steps), "seed": self.seed}
        plan = plan_of(model, lora, found, names if self.share else kept, shares, **record)
        shared = [name for name in names if name not in kept] if self.share else []
        return PreparedPlan(plan, partial(tie_by_shape, names=shared))


build = LoraDrop


def fewest(shares: Sequence[float], energy: float) -> list[int]:
    """Return the positions of the fewest shares that add up to at least ``energy``, sorted.

    Example:
        >>> fewest([0.1, 0.5, 0.2, 0.2], 0.7)
        [1, 2]
    """
    order = sorted(range(len(shares)), key=lambda i: -shares[i])
    sums = itertools.accumulate(shares[i] for i in order)
    count = next((n for n, sum_ in enumerate(sums, start=1) if sum_ >= energy - 1e-9), len(order))
    return sorted(order[:count])


def tie_by_shape(model: PeftModel, names: Sequence[str]) -> None:
    """Make the sites ``names`` of equal shape share A and B: one tensor each, trained once."""
    layers: dict[str, Any] = dict(lora_layers(model))
    first: dict[tuple[torch.Size, torch.Size], Any] = {}
    for name in names:
        a, b = layers[name].lora_A["default"], layers[name].lora_B["default"]
        shared = first.setdefault((a.weight.shape, b.weight.shape), (a.weight, b.weight))
        a.weight, b.weight = shared


def _energies(stage: Stage, count: int) -> Tensor:
    """Return Σ‖s·B·A·x‖² of each site over ``count`` batches, without dropout and padding."""
    sums = torch.zeros(len(stage.layers), dtype=torch.float64)
    with evaluated(stage.model), counted_tokens(stage.model) as rows, torch.no_grad():
        handles = [
            layer.lora_B["default"].register_forward_hook(_Meter(sums, i, layer.scaling["default"], rows))
            for i, layer in enumerate(stage.layers.values())
        ]
        for _ in range(count):
            for _loss in in_parts(stage.model, next(stage.batches), stage.loss_fn):
                pass
            stage.progress.update()
        for handle in handles:
            handle.remove()
    return add_up(sums)


class _Meter:
    """A forward hook on ``lora_B`` that sums the squares of its output."""

    def __init__(self, sums: Tensor, place: int, scale: float, rows: TokenRows) -> None:
        self.sums, self.place, self.scale, self.rows = sums, place, scale, rows

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self.sums[self.place] += (self.scale * self.rows(output).float()).square().sum().cpu()
