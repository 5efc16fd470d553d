"""The batches of a scoring and the loss of one batch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.errors import SelectionError, WeightLoraWarning
from weightlora.model.gathering import device_of

Loss = Callable[[nn.Module, Any], Tensor | Iterable[Tensor]]
"""``loss_fn(model, batch)``: one number, or an iterable of the losses of micro-batches whose gradients add up."""
_NO_BATCH = "batches is empty; give at least one batch, best one for each scoring step"


def cycled(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """Yield ``steps`` batches; start again with a warning where there are fewer.

    Raises:
        SelectionError: There is no batch at all.
    """
    seen: list[Any] = []
    for batch in itertools.islice(batches, steps):
        seen.append(batch)
        yield batch
    if not seen:
        raise SelectionError(_NO_BATCH)
    if len(seen) < steps:
        warnings.warn(
            f"{len(seen)} batches for {steps} scoring steps: they are used again; give more batches or fewer steps",
            WeightLoraWarning,
            stacklevel=2,
        )
        yield from itertools.islice(itertools.cycle(seen), steps - len(seen))


def peeked(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first batch, and an iterator over all of them.

    Raises:
        SelectionError: There is none.
    """
    iterator = iter(batches)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise SelectionError(_NO_BATCH)


def held_out(batches: Iterable[Any], rows: int) -> list[Any]:
    """Return the first batches that together have at least ``rows`` rows, or all of them.

    Raises:
        SelectionError: There is none.
    """
    taken: list[Any] = []
    _, shown = peeked(batches)
    for batch in shown:
        taken.append(batch)
        if sum(map(rows_of, taken)) >= rows:
            break
    return taken


def rows_of(batch: Any) -> int:
    """Return the length of a batch's first tensor; 1 where there is none.

    Example:
        >>> rows_of({"input_ids": torch.zeros(4, 7)}), rows_of((torch.zeros(3, 2), "x")), rows_of("x")
        (4, 3, 1)
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 1)


def in_parts(model: nn.Module, batch: Any, loss_fn: Loss) -> Iterable[Any]:
    """Return the loss of ``batch``, or the losses of its micro-batches, computed on the model's device."""
    losses: Any = loss_fn(model, to_device(batch, device_of(model)))
    return [losses] if isinstance(losses, Tensor) or not isinstance(losses, Iterable) else losses


@dataclass(frozen=True)
class FirstBatch:
    """The batch that a step is measured on; called, it runs the forward passes."""

    model: nn.Module
    batch: Any
    loss_fn: Loss

    def __call__(self) -> Iterable[Any]:
        """Return the losses of the batch or of its micro-batches."""
        return in_parts(self.model, self.batch, self.loss_fn)

    @property
    def rows(self) -> int:
        """The most rows that are computed at once."""
        return max(map(len, _row_tensors(self.batch)), default=1)

    def of_rows(self, rows: int) -> FirstBatch:
        """Return the batch with at most so many rows at once.

        Example:
            >>> FirstBatch(nn.Identity(), ([{"x": torch.ones(8, 3)}], 5), lambda model, batch: []).of_rows(2).rows
            2
        """
        return replace(self, batch=_cut(self.batch, rows))


def _row_tensors(batch: Any) -> Iterator[Tensor]:
    """The first tensor of each mapping or tuple of tensors in a batch."""
    parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, (Mapping, tuple, list)):
        parts = [batch]
    first = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if first is not None:
        yield first
        return
    for part in parts:
        if isinstance(part, (Mapping, tuple, list)):
            yield from _row_tensors(part)


def _cut(batch: Any, rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:rows] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_cut(value, rows) for value in batch)
    return batch


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return ``model(**batch).loss``, the default ``loss_fn``.

    Raises:
        SelectionError: The batch is no mapping, or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise SelectionError(f"a batch is {kind_of(batch)}; give dicts, or a loss_fn(model, batch) that reads yours")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise SelectionError("the model returned no loss; put labels into the batches, or give a loss_fn(model, batch)")
    return loss


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a mapping with its tensors on ``device``; any other batch unchanged."""
    if not isinstance(batch, Mapping):
        return batch
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def kind_of(value: object) -> str:
    """Describe a value for an error: its type, and a tensor's shape."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
