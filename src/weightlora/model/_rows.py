"""Rows of a batch by their content: a key that is the same in every batch and under every padding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from weightlora.errors import OptionError

#: Arguments of a model that decide nothing below its head.
NOT_READ = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label", "return_loss")


@dataclass(frozen=True)
class Row:
    """A row of a batch without its padding, or one of several that are packed into a row."""

    key: bytes
    index: int
    """Of the row in the batch."""
    place: slice
    """Of its tokens in that row."""


def read_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that a model computes its hidden states from: neither labels nor what its decoder is given."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and _is_read(name)}


def _is_read(name: str) -> bool:
    return name not in NOT_READ and not name.startswith("decoder_") and not name.endswith("_labels")


def rows_of(inputs: Mapping[str, Tensor], *, split: bool = False) -> list[Row]:
    """Return the rows of a batch: a key of what a row is without its padding, and where it is.

    Args:
        inputs: What the model is called with, shape (rows, ...). Padding is where ``attention_mask`` is 0.
        split: Take packed rows one by one: without a mask, each position of 0 begins one.

    Raises:
        OptionError: There is no input of rows, or the mask is none of tokens.

    Example:
        >>> ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
        >>> short = rows_of({"input_ids": ids[:1, :2], "attention_mask": torch.ones(1, 2)})
        >>> padded = rows_of({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
        >>> short[0] == padded[0], padded[0].key == padded[1].key
        (True, False)
    """
    if not inputs:
        raise OptionError("the model is called without tensors, by which its rows could be known")
    count = len(next(iter(inputs.values())))
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise OptionError(f"attention_mask has {mask.dim()} dimensions; a store needs the one of tokens, with two")
    real = None if mask is None else mask.cpu() != 0
    columns = {name: value.detach().cpu() for name, value in inputs.items() if value.dim() and len(value) == count}
    rows: list[Row] = []
    for i in range(count):
        for place in _places(None if real is None else real[i], columns.get("position_ids"), i, split=split):
            digest = hashlib.blake2b(str(0 if real is None else place.start or 0).encode(), digest_size=16)
            for name in sorted(columns):
                value = columns[name][i]
                if place != slice(None) and value.dim() and len(value) == tokens_of(inputs):
                    value = value[place]
                value = value.bool() if name == "attention_mask" else value
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            rows.append(Row(digest.digest(), i, place))
    return rows


def _places(real: Tensor | None, positions: Tensor | None, i: int, *, split: bool) -> list[slice]:
    """Where the tokens of row i are: all but the padding, or those of each row that is packed into it."""
    if real is not None:
        kept = real.nonzero()
        return [slice(int(kept[0]), int(kept[-1]) + 1)] if len(kept) else [slice(None)]
    if not split or positions is None:
        return [slice(None)]
    starts = (positions[i] == 0).nonzero().flatten().tolist() or [0]
    return [slice(a, b) for a, b in pairwise([*starts, positions.shape[1]])]


def tokens_of(inputs: Mapping[str, Tensor]) -> int | None:
    """How many tokens a row of the batch has, with its padding; None for other inputs than tokens."""
    known = (inputs.get(name) for name in ("attention_mask", "position_ids", "input_ids"))
    return next((int(value.shape[1]) for value in known if value is not None), None)


def assembled(values: Sequence[Tensor], rows: Sequence[Row], inputs: Mapping[str, Tensor]) -> Tensor:
    """The rows as one batch; where there is padding it is 0."""
    if all(row.place == slice(None) for row in rows):
        return torch.stack([*values])
    count, tokens = len(next(iter(inputs.values()))), tokens_of(inputs)
    assert tokens is not None, "rows with places have tokens"
    whole = values[0].new_zeros(count, tokens, *values[0].shape[1:])
    for value, row in zip(values, rows, strict=True):
        whole[row.index, row.place] = value
    return whole
