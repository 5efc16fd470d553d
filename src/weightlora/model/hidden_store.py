"""Hidden states by a key of their row, in memory or in a file that outlives the process.

folder/hidden.json    what the states belong to: weights, floor, types; another model is refused
folder/hidden.bin     the states, one after the other
folder/hidden.jsonl   key, place, shape and checksum of each; a line is written after its state
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlora.errors import DataError, WeightLoraWarning
from weightlora.files import only_writer, read_json, write_json, written

_HEADER, _STATES, _INDEX = "hidden.json", "hidden.bin", "hidden.jsonl"


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
class _Place:
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
            place = _place(line)
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
        place: _Place | None = self._kept.get(key)
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
            place = _Place(offset, tuple(value.shape), zlib.crc32(content))
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


def _place(line: bytes) -> tuple[bytes, _Place] | None:
    try:
        found: Any = json.loads(line)
        shape = tuple(int(size) for size in found["shape"])
        place = _Place(int(found["offset"]), shape, int(found["crc32"]))
        return (bytes.fromhex(found["key"]), place) if place.offset >= 0 and min(shape, default=1) >= 0 else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
