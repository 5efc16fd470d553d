"""Write an adapter: its tensors one at a time, its configuration, what lies beside it, and a GGUF file of it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlora.errors import OptionError, OutputError, ServingError
from weightlora.plan.card import CARD_FILE, LABELS_FILE, PICTURE_FILE
from weightlora.serving import GGUF_FILE
from weightlora.serving.adapter import write_config

#: The format's names of the types that adapters are saved in, and of what PEFT saves with them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: What a stranger loads the adapter with: its card and picture, the names of its classes and its tokenizer.
_BESIDE = (CARD_FILE, PICTURE_FILE, LABELS_FILE, "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")


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
    with path.open("wb") as file:
        file.write(file_header(tensors))
        for name, own in tensors.items():
            file.write(_bytes(name, own))


def file_header(tensors: Mapping[str, Planned]) -> bytes:
    """Return what the file of ``tensors`` begins with, up to the first number."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, own in tensors.items():
        start, end = end, end + math.prod(own.shape) * DTYPES[own.dtype].itemsize
        header[name] = {"dtype": own.dtype, "shape": own.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, own: Planned) -> bytes:
    tensor = own.make().to(DTYPES[own.dtype]).contiguous()
    assert tensor.shape == own.shape, f"{name} was made in another shape"
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def stock_config(config: Mapping[str, Any], ranks: Mapping[str, int], r: int, *, alpha: float) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter with one alpha; patterns are regular expressions, so dots are escaped.

    Args:
        config: The adapter's own; what says nothing of sites, ranks and scales stays.
        ranks: Of each site by its name.
        r: The rank of sites that get no pattern.
        alpha: ``lora_alpha`` of all sites.
    """
    return {
        **config,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != r},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": [*ranks],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def copy_beside(folder: Path, target: Path) -> None:
    """Copy the card, the names of the classes and the tokenizer of the adapter in ``folder``."""
    for file in (file for pattern in _BESIDE for file in folder.glob(pattern) if file.is_file()):
        shutil.copyfile(file, target / file.name)


def require_apart(folder: Path, output_dir: Path) -> None:
    """Raise where writing ``output_dir`` would touch the adapter in ``folder``.

    Raises:
        OutputError: One lies in the other.
    """
    here, there = (Path(os.path.realpath(path)) for path in (folder, output_dir))
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise OutputError(
            f"{output_dir} and the adapter {folder} overlap; choose an --output_dir outside of the adapter"
        )


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
