"""Memory over the number of adapters at the paper's own sizes, computed from a model's config: Figures 6 and 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig

from weightlora.bench.table import Cell, Table
from weightlora.cost.comparison import MemoryLine, compare_memory
from weightlora.cost.empty_model import make_empty_model, make_loss_of
from weightlora.cost.memory import Setting
from weightlora.paper.picture import Curve, Lines, Picture
from weightlora.paper.study import Study

_PEAK = "peak of a training step, GB"


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
