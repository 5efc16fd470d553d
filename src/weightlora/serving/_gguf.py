"""An adapter as a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from weightlora.errors import OptionError, ServingError
from weightlora.serving import GGUF_FILE
from weightlora.serving.base_model import write_config


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
