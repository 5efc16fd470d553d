"""Hidden states by a key of their row, in memory or in a file that outlives the process.

folder/hidden.json    what the states belong to: weights, floor, types; another model is refused
folder/hidden.bin     the states, one after the other
folder/hidden.jsonl   key, place, shape and checksum of each; a line is written after its state

The key is of the row's content: the same in every batch and under every padding.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlora.errors import DataError, OptionError, WeightLoraWarning
from weightlora.files import only_writer, read_json, write_json, written

_HEADER, _STATES, _INDEX = "hidden.json", "hidden.bin", "hidden.jsonl"
#: Arguments of a model that decide nothing below its head.
NOT_READ = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label", "return_loss")


class HiddenStore:
    """Tensors of one type by their keys, within a number of bytes; those that are beyond it are not kept.

    Args:
        dtype: What the tensors are stored as.
        limit: The most bytes; None: as many as there are.

    Example:
        >>> store = HiddenStore(torch.float32, limit=16)
        >>> store.put(b"a", torch.ones(2, 2)), store.put(b"b", torch.ones(2, 2))
        (True, False)
        >>> store.get(b"a").shape, store.get(b"b"), len(store), store.bytes
        (torch.Size([2, 2]), None, 1, 16)
    """

    def __init__(self, dtype: torch.dtype, limit: int | None = None) -> None:
        self.dtype, self.limit, self.bytes = dtype, limit, 0
        self.is_full = False
        """Whether a tensor did not fit."""
        self._kept: dict[bytes, Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Tensor | None:
        """Return the tensor of a key; None where there is none."""
        return self._kept.get(key)

    def put(self, key: bytes, value: Tensor) -> bool:
        """Keep a tensor, and return whether it fits."""
        size = value.numel() * self.dtype.itemsize
        if self.limit is not None and self.bytes + size > self.limit:
            self.is_full = True
        elif key not in self._kept and self._keep(key, value.detach().to("cpu", self.dtype).contiguous()):
            self.bytes += size
        return key in self._kept

    def _keep(self, key: bytes, value: Tensor) -> bool:
        self._kept[key] = value.clone()
        return True

    def close(self) -> None:
        """Give the memory, or the files, back."""
        self._kept.clear()


@dataclass(frozen=True)
class _Extent:
    offset: int
    shape: tuple[int, ...]
    checksum: int


class HiddenFile(HiddenStore):
    """A :class:`HiddenStore` in a folder; what is there of the same model is used, and what is damaged is not.

    Args:
        folder: Of one process alone.
        header: What the states belong to.
        dtype: As of :class:`HiddenStore`.
        limit: As of :class:`HiddenStore`.

    Raises:
        DataError: The folder has states of something else.
        OptionError: Another process writes there.
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], dtype: torch.dtype, limit: int | None = None) -> None:
        super().__init__(dtype, limit)
        self._folder = folder
        self._stack = ExitStack()
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(only_writer(folder))
            self._require_same(header)
            self._states: FileIO = self._stack.enter_context((folder / _STATES).open("a+b", buffering=0))
            self._read_index()
            self._index: FileIO = self._stack.enter_context((folder / _INDEX).open("ab", buffering=0))

    def _require_same(self, header: Mapping[str, Any]) -> None:
        path = self._folder / _HEADER
        wanted = {**header, "dtype": str(self.dtype)}
        if not path.exists():
            (self._folder / _INDEX).unlink(missing_ok=True)
            (self._folder / _STATES).unlink(missing_ok=True)
            write_json(path, wanted)
            return
        there: Any = read_json(path)
        if there != wanted:
            names = [key for key in wanted if not isinstance(there, dict) or there.get(key) != wanted[key]]
            raise DataError(
                f"{self._folder} holds hidden states of something else (other {', '.join(names) or 'content'}); choose "
                "another folder, or delete it"
            )

    def _read_index(self) -> None:
        path, end = self._folder / _INDEX, os.fstat(self._states.fileno()).st_size
        whole, faults = 0, 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            place = _extent(line)
            if place is None or place[1].offset + self._size(place[1].shape) > end:
                faults += 1
                continue
            self._kept[place[0]] = place[1]
            whole = max(whole, place[1].offset + self._size(place[1].shape))
        if faults:
            warnings.warn(
                f"{path}: {faults} of {len(lines)} lines are damaged or their states are cut off; these rows are "
                "computed again",
                WeightLoraWarning,
                stacklevel=4,
            )
        if lines and not lines[-1].endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")
        self._states.truncate(whole)  # what a killed process left without a line
        self.bytes = sum(self._size(place.shape) for place in self._kept.values())

    def _size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def get(self, key: bytes) -> Tensor | None:
        """Return the tensor of a key; None where there is none, or a damaged one."""
        place: _Extent | None = self._kept.get(key)
        if place is None:
            return None
        content = os.pread(self._states.fileno(), self._size(place.shape), place.offset)
        if zlib.crc32(content) != place.checksum:
            del self._kept[key]
            self.bytes -= self._size(place.shape)
            warnings.warn(
                f"{self._folder / _STATES} is damaged at byte {place.offset}; that row is computed again",
                WeightLoraWarning,
                stacklevel=2,
            )
            return None
        return torch.frombuffer(bytearray(content), dtype=self.dtype).reshape(place.shape)

    def _keep(self, key: bytes, value: Tensor) -> bool:
        content = value.view(torch.uint8).numpy().tobytes()
        try:
            offset = self._states.seek(0, os.SEEK_END)
            _write(self._states, content)
            place = _Extent(offset, tuple(value.shape), zlib.crc32(content))
            line = {"key": key.hex(), "offset": offset, "shape": place.shape, "crc32": place.checksum}
            _write(self._index, (json.dumps(line) + "\n").encode())
        except OSError as error:  # a full disk: what is there stays of use
            self.limit, self.is_full = self.bytes, True
            warnings.warn(
                f"{self._folder}: {error.strerror or error}; {len(self)} rows are stored, and the others are computed "
                "in every epoch",
                WeightLoraWarning,
                stacklevel=3,
            )
            return False
        self._kept[key] = place
        return True

    def close(self) -> None:
        """Close the files, which stay."""
        self._stack.close()
        super().close()


def _write(file: FileIO, content: bytes) -> None:
    """Write all of it; nothing is buffered, so that a full disk is known here and not when the file is closed."""
    if file.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _extent(line: bytes) -> tuple[bytes, _Extent] | None:
    try:
        found: Any = json.loads(line)
        shape = tuple(int(size) for size in found["shape"])
        place = _Extent(int(found["offset"]), shape, int(found["crc32"]))
        return (bytes.fromhex(found["key"]), place) if place.offset >= 0 and min(shape, default=1) >= 0 else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


# -- rows of a batch ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchRow:
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


def rows_of(inputs: Mapping[str, Tensor], *, split: bool = False) -> list[BatchRow]:
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
    rows: list[BatchRow] = []
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
            rows.append(BatchRow(digest.digest(), i, place))
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


def assembled(values: Sequence[Tensor], rows: Sequence[BatchRow], inputs: Mapping[str, Tensor]) -> Tensor:
    """The rows as one batch; where there is padding it is 0."""
    if all(row.place == slice(None) for row in rows):
        return torch.stack([*values])
    count, tokens = len(next(iter(inputs.values()))), tokens_of(inputs)
    assert tokens is not None, "rows with places have tokens"
    whole = values[0].new_zeros(count, tokens, *values[0].shape[1:])
    for value, row in zip(values, rows, strict=True):
        whole[row.index, row.place] = value
    return whole
