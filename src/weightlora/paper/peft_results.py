"""The result files of PEFT's own benchmark, ``method_comparison/MetaMathQA``, as a table of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlora.bench.table import Cell, Table
from weightlora.errors import DataError
from weightlora.files import read_json

_HEADER = ("experiment", "# params", "accuracy", "loss", "forgetting", "minutes", "peak GB", "device")


def peft_table(paths: Sequence[Path]) -> Table:
    """Return the finished experiments of PEFT's benchmark, the most accurate first.

    Args:
        paths: Its result files.

    Raises:
        DataError: A file is none of them, or of a run that failed.
    """
    rows = sorted((_row(path) for path in paths), key=lambda row: -float(row[2]))
    return Table(_HEADER, tuple(tuple(map(Cell, row)) for row in rows), "GSM8K, test accuracy in per cent")


def _row(path: Path) -> tuple[str, ...]:
    found: Any = read_json(path)
    try:
        info, run = found["train_info"], found["run_info"]
        if info["status"] != "success":
            raise DataError(f"{path} is of a run that ended with status {info['status']!r:.40}; give finished runs")
        last: Mapping[str, Any] = info["metrics"][-1]
        numbers = (
            f"{int(info['num_trainable_params']):,}",
            _number(100 * last["test accuracy"], 1),
            _number(last["train loss"], 3),
            _number(last.get("forgetting", math.nan), 3),
            _number(info["train_time"] / 60, 1),
            _number(info["accelerator_memory_max"] / 1e9, 1),
        )
        return str(run["experiment_name"]), *numbers, str(found["meta_info"]["system_info"]["accelerator"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is no result file of PEFT's method_comparison/MetaMathQA ({type(error).__name__}: {error})"
        ) from error


def _number(value: float, digits: int) -> str:
    return f"{float(value):.{digits}f}"
