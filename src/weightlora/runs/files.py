"""Names of the files in a run's folder; nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_FILE, BEFORE_FILE, RESULTS_FILE, BATCH_FILE = "config.yaml", "before.json", "results.json", "batch.json"
HEATMAP_FILE, KNEE_FILE = "heatmap.png", "knee.png"
ADAPTER = "adapter"
#: Of a benchmark.
RECORDS_FILE = "records.jsonl"


def adapter_in(folder: Path) -> Path:
    """Return the adapter's folder, where ``folder`` is that of a run; any other folder as it is.

    Example:
        >>> (tmp_path / "adapter").mkdir()
        >>> (tmp_path / "config.yaml").touch()
        >>> adapter_in(tmp_path).name, adapter_in(tmp_path / "adapter").name
        ('adapter', 'adapter')
    """
    return folder / ADAPTER if (folder / CONFIG_FILE).is_file() and (folder / ADAPTER).is_dir() else folder


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, the first step's first; other files and folders are left out.

    Example:
        >>> for name in ("checkpoint-10", "checkpoint-2", "checkpoint-best"):
        ...     (tmp_path / name).mkdir()
        >>> [folder.name for folder in checkpoints(tmp_path)]
        ['checkpoint-2', 'checkpoint-10']
    """
    folders = [path for path in output.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(folders, key=lambda folder: step_of(folder) or 0)


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint's name; None where the name is another."""
    match = re.fullmatch(r"checkpoint-([0-9]{1,18})", folder.name)
    return None if match is None else int(match.group(1))
