"""Methods side by side on the same data in the same order: accuracy, parameters, seconds, step time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weightlora.cost.step_time import in_turns, median_ratio

if TYPE_CHECKING:
    from torch import nn

    from weightlora.bench.run import Outcome


@dataclass(frozen=True)
class Comparison:
    """A line of the table."""

    method: str
    adapters: int
    parameters: int
    """Trainable parameters, the head's included."""
    percent: float
    """The same as a share of all parameters of the base model, in per cent."""
    accuracy: float
    selection_seconds: float
    training_seconds: float
    step_ratio: float
    """Median time of a training step ÷ that of the first method."""


def compare(
    outcomes: Mapping[str, Outcome], batch: Mapping[str, torch.Tensor], *, rounds: int = 12
) -> list[Comparison]:
    """Return a line a method; the first one is what step times are relative to.

    Args:
        outcomes: Finished runs by the method's name.
        batch: The batch that steps are timed on.
        rounds: Steps timed a method.
    """
    ratios = step_ratios({name: outcome.model for name, outcome in outcomes.items()}, batch, rounds=rounds)
    return [
        Comparison(
            method=name,
            adapters=len(outcome.plan.names),
            parameters=(count := _trainable(outcome.model)),
            percent=100 * count / sum(p.numel() for p in outcome.model.get_base_model().parameters()),
            accuracy=outcome.accuracy,
            selection_seconds=outcome.selection_seconds,
            training_seconds=outcome.training_seconds,
            step_ratio=ratios[name],
        )
        for name, outcome in outcomes.items()
    ]


def step_ratios(models: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor], *, rounds: int) -> dict[str, float]:
    """Return each model's step time ÷ the first model's: medians of steps taken in turns in this process.

    AdamW really steps, at a learning rate of 0: the weights stay what they are.
    """

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = [[p for p in model.parameters() if p.requires_grad] for model in models.values()]
    optimizers = [torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) for parameters in trained]
    seconds = in_turns([partial(step, *pair) for pair in zip(models.values(), optimizers, strict=True)], rounds)
    return {name: median_ratio(times, seconds[0]) for name, times in zip(models, seconds, strict=True)}


def table_rows(lines: Sequence[Comparison]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the table's header and its rows as text, for a terminal, Markdown or HTML."""
    header = ("method", "adapters", "trained", "% model", "accuracy", "select s", "step ÷ LoRA")
    rows = [
        (
            line.method,
            str(line.adapters),
            f"{line.parameters:,}",
            f"{line.percent:.2f}",
            f"{line.accuracy:.3f}",
            f"{line.selection_seconds:.1f}",
            f"{line.step_ratio:.2f}",
        )
        for line in lines
    ]
    return header, rows


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
