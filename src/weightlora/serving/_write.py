"""Write tensors one at a time, and an adapter as a GGUF file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightlora.errors import OptionError, ServingError
from weightlora.serving import GGUF_FILE
from weightlora.serving.adapter import write_config

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


def write_gguf(converter: str | Path, folder: Path, base: str, task_type: str | None) -> Path:
    """Convert the adapter in ``folder`` and return its new file ``adapter.gguf`` there.

    Args:
        converter: llama.cpp's convert_lora_to_gguf.py; it runs with this Python, which needs its packages.
        folder: PEFT's files.
        base: The base model, of which the converter reads the configuration.
        task_type: PEFT's.

    Raises:
        OptionError: There is no such script.
        ServingError: The converter fails.
        DataError: There is no such base model.
    """
    if not Path(converter).is_file():
        raise OptionError(f"converter={str(converter)!r} is no file; give the path of convert_lora_to_gguf.py")
    target = folder / GGUF_FILE
    with tempfile.TemporaryDirectory() as temporary:
        known = Path(base) if (Path(base) / "config.json").is_file() else write_config(base, task_type, temporary)
        # As exact as PEFT's files, whatever type of number those have.
        options = ["--base", str(known.absolute()), "--outfile", str(target.absolute()), "--outtype", "f32"]
        command = [sys.executable, str(converter), str(folder.absolute()), *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not target.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ServingError(f"{Path(converter).name} fails: {said:.300}")
    return target
