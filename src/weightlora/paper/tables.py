"""Tables of what was not trained here: memory computed from a model's config, and the results of PEFT's own benchmark.

Memory is over the number of adapters at the paper's own sizes: Figures 6 and 7. PEFT's benchmark is
``method_comparison/MetaMathQA``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig

from weightlora.bench.table import Cell, Table
from weightlora.cost.empty_model import make_empty_model, make_loss_of
from weightlora.cost.estimate import MemoryLine, compare_memory
from weightlora.cost.memory import Setting
from weightlora.errors import DataError
from weightlora.files import read_json
from weightlora.paper.picture import Curve, Lines, Picture
from weightlora.paper.study import Study

_PEAK = "peak of a training step, GB"
_PEFT_HEADER = ("experiment", "# params", "accuracy", "loss", "forgetting", "minutes", "peak GB", "device")


def computed_memory(study: Study, size: str) -> tuple[Table, Picture]:
    """Return the peak of a training step over K: a panel for each entry of ``memory``.

    WeightLoRA has two curves, the uppermost K sites and the lowest: the backward pass ends at the lowest adapter.
    """
    panels = [_panel(study, entry) for entry in study.setup(size).memory]
    places = sorted({x for panel in panels for curve in panel.curves for x in curve.x})
    body: list[tuple[Cell, ...]] = []
    for panel in panels:
        for curve in panel.curves:
            found = dict(zip(curve.x, curve.y, strict=True)) if curve.x else dict.fromkeys(places, curve.y[0])
            texts = (f"{found[place]:.2f}" if place in found else "" for place in places)
            label = curve.label if len(panels) == 1 else f"{curve.label}, {panel.title}"
            body.append((Cell(label), *map(Cell, texts)))
    header = ("method", *(f"K = {place:g}" for place in places))
    table = Table(header, tuple(body), f"{_PEAK}, computed from the config; nothing was measured")
    return table, Picture(f"{study.title} ({study.place})", tuple(panels))


def _panel(study: Study, entry: Mapping[str, Any]) -> Lines:
    """The curves of one model, batch and precision; one call for each K, so that WeightLoRA+ has every K too."""
    setting = Setting(entry["rows"])
    peaks: dict[str, dict[float, float]] = {}
    for rank in entry["ranks"]:
        lora = LoraConfig(
            r=rank,
            lora_dropout=entry["lora_dropout"],
            target_modules=entry.get("lora_target_modules"),
            task_type=entry["task_type"],
        )
        for k in entry["adapters"]:
            for line in _compare(entry, lora, setting, k):
                if line.sites is not None and line.name in entry["methods"]:
                    label = line.name if len(entry["ranks"]) == 1 else f"{line.name}, r = {rank}"
                    peaks.setdefault(label, {})[k] = line.memory.peak / 1e9
    curves = [_curve(label, found) for label, found in peaks.items()]
    if "limit_gb" in entry:
        curves.append(Curve(f"{entry['limit_gb']:g} GB", (), (entry["limit_gb"],), (0.0,)))
    return Lines(entry["title"], study.axes["x_label"], _PEAK, tuple(curves))


def _curve(label: str, peaks: Mapping[float, float]) -> Curve:
    """Plain LoRA does not depend on K."""
    if label.split(",")[0] == "LoRA":
        return Curve(label, (), (next(iter(peaks.values())),), (0.0,))
    return Curve(label, tuple(peaks), tuple(peaks.values()), (0.0,) * len(peaks))


def _compare(entry: Mapping[str, Any], lora: LoraConfig, setting: Setting, k: int) -> Sequence[MemoryLine]:
    config = AutoConfig.from_pretrained(str(entry["config"]))
    make_model = partial(make_empty_model, config, entry["task_type"], bits=entry.get("bits"))
    make_loss = make_loss_of(entry["task_type"], entry["length"], "meta")
    return compare_memory(make_model, make_loss, lora, setting, adapters=[k])


# -- PEFT's own benchmark ----------------------------------------------------------------------------------------------


def peft_table(paths: Sequence[Path]) -> Table:
    """Return the finished experiments of PEFT's benchmark, the most accurate first.

    Args:
        paths: Its result files.

    Raises:
        DataError: A file is none of them, or of a run that failed.
    """
    rows = sorted((_peft_row(path) for path in paths), key=lambda row: -float(row[2]))
    return Table(_PEFT_HEADER, tuple(tuple(map(Cell, row)) for row in rows), "GSM8K, test accuracy in per cent")


def _peft_row(path: Path) -> tuple[str, ...]:
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
