"""Write a safetensors file one tensor at a time: the library's own writer needs all of them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: The format's names of the types that adapters are saved in.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    dtype: str
    """One of :data:`DTYPES`."""
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """Called when it is its turn; may return another type of number."""


def write_tensors(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Write ``tensors`` in their order; at any time one of them is in memory.

    Example:
        >>> write_tensors(tmp_path / "a.safetensors", {"a": Planned("BF16", (2,), lambda: torch.ones(2))})
        >>> from safetensors.torch import load_file
        >>> load_file(tmp_path / "a.safetensors")["a"]
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, own in tensors.items():
        start, end = end, end + math.prod(own.shape) * DTYPES[own.dtype].itemsize
        header[name] = {"dtype": own.dtype, "shape": own.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, own in tensors.items():
            file.write(_bytes(name, own))


def _bytes(name: str, own: Planned) -> bytes:
    tensor = own.make().to(DTYPES[own.dtype]).contiguous()
    assert tensor.shape == own.shape, f"{name} was made in another shape"
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
