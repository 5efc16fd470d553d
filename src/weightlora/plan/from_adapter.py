"""Read the plan of any PEFT LoRA adapter directory, from its ``plan.json`` or its tensors' shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from weightlora.errors import PlanError
from weightlora.model.sites import Site
from weightlora.plan._lora_schema import MOST_ALPHA, is_number
from weightlora.plan._schema import text_fault
from weightlora.plan.plan import AdapterPlan, PlannedSite

#: Files that PEFT writes: the configuration and the tensors.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_adapter(folder: str | Path) -> AdapterPlan:
    """Return the adapter's ``plan.json``, or a plan of its tensors, in which all sites are kept and none is scored.

    Args:
        folder: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        PlanError: The directory holds no LoRA adapter, or cannot be read.
    """
    folder = Path(folder)
    if (folder / "plan.json").exists():
        return AdapterPlan.load(folder / "plan.json")
    config = adapter_config(folder)
    shapes = {key: shape for key, shape in tensor_shapes(folder).items() if len(shape) == 2}
    alpha, base = config.get("lora_alpha", 1), config.get("base_model_name_or_path")
    if not is_number(alpha, 0, MOST_ALPHA) or alpha == 0:
        raise PlanError(f"{folder} has lora_alpha={alpha!r:.40}; give a positive number up to {MOST_ALPHA:g}")
    if not isinstance(base, str | None) or text_fault(base):
        raise PlanError(f"{folder} has base_model_name_or_path={base!r:.40}; give a name, a path or null")
    entries: list[PlannedSite] = []
    for key, (r, in_features) in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match:
            out_features, columns = shapes.get(f"base_model.model.{match.group(1)}.lora_B.weight", (0, 0))
            if columns != r or min(r, in_features, out_features) < 1:
                raise PlanError(
                    f"{folder} is damaged: {key} has shape {(r, in_features)}, its lora_B {(out_features, columns)}"
                )
            site = Site(match.group(1), in_features, out_features)
            entries.append(PlannedSite(site, r, alpha, r=r, alpha=alpha, score=0.0))
    if not entries:
        raise PlanError(f"{folder} holds no LoRA matrices; its tensors are named {', '.join(list(shapes)[:3])}")
    entries.sort(key=lambda entry: entry.site.name)
    lora = {field: True for field in ("use_dora", "lora_bias") if config.get(field) is True}
    return AdapterPlan(tuple(entries), lora=lora, rule="adapter", base_model=base)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's ``adapter_config.json``.

    Raises:
        PlanError: It is missing or holds no mapping.
    """
    try:
        config: Any = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{folder} is not an adapter directory: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{folder} is not an adapter directory: {ADAPTER_FILES[0]} holds {config!r:.40}")
    return cast("dict[str, Any]", config)


def tensor_shapes(folder: Path, file: str = ADAPTER_FILES[1]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter, sorted by name; only the file's header is read.

    Raises:
        PlanError: The file is missing or damaged.
    """
    try:
        with safe_open(folder / file, framework="numpy") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in sorted(tensors.keys())}
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{folder} is not an adapter directory: {error}") from error
