"""The batches of a scoring, the loss of one batch, and which rows of a layer's activations are tokens of the batch.

Legend of the shapes: b rows of the batch, s tokens a row, d features, n counted tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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


# -- which rows of a layer are tokens ----------------------------------------------------------------------------------


@dataclass
class TokenRows:
    """Selects the counted rows of an activation in the current forward pass."""

    masks: list[Tensor] = field(default_factory=list[Tensor])  # (b, s), true where a token counts

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows of ``x`` that count, (n, d).

        An activation of three dimensions that fits none of the batch's masks has no tokens, and none counts: DeBERTa
        calls its query and key projections a second time on positions.
        """
        flat = x.flatten(0, -2)
        for mask in self.masks:
            if x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return flat[mask.flatten()]
        return flat[:0] if self.masks and x.ndim > 2 else flat


@contextmanager
def counted_tokens(model: nn.Module, *, labelled: bool = False) -> Generator[TokenRows]:
    """Yield a function that selects the tokens among a layer's rows, while ``model`` runs inside the block.

    Tokens of ``attention_mask`` count, and in an encoder–decoder those of the target with a label. Without a mask all
    rows count. Source and target are distinguished by their lengths; if these are equal, the source's mask is used for
    both.

    Args:
        model: Called with keyword arguments, as trainers do.
        labelled: Only a decoder's tokens with a label count.

    Example:
        >>> import torch
        >>> class Net(nn.Linear):
        ...     def forward(self, x, attention_mask):
        ...         return super().forward(x)
        >>> net, x = Net(2, 2), torch.ones(1, 3, 2)
        >>> with counted_tokens(net) as rows:
        ...     _ = net(x, attention_mask=torch.tensor([[1, 1, 0]]))
        >>> rows(x).shape, rows(torch.ones(1, 7, 2)).shape
        (torch.Size([2, 2]), torch.Size([0, 2]))
    """
    rows = TokenRows()
    config: Any = vars(model).get("config")
    two_texts = bool(getattr(config, "is_encoder_decoder", False))

    def watch(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        rows.masks = _masks(given, labelled=labelled, two_texts=two_texts)

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def _masks(given: Mapping[str, Any], *, labelled: bool, two_texts: bool) -> list[Tensor]:
    mask, labels = given.get("attention_mask"), given.get("labels")
    masks: list[Tensor] = [mask.bool()] if isinstance(mask, Tensor) and mask.ndim == 2 else []
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return masks
    known = labels != -100
    if two_texts:
        return [*masks, known]
    if not labelled:
        return masks
    return [masks[0] & known if masks and masks[0].shape == known.shape else known]
