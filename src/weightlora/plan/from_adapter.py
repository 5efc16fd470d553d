"""Read the plan of any PEFT LoRA adapter directory, from its ``plan.json`` or its tensors' shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from weightlora.errors import PlanError
from weightlora.model.sites import Site
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
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        shapes = {key: shape for key, shape in tensor_shapes(folder).items() if len(shape) == 2}
    except (OSError, ValueError, SafetensorError) as error:
        raise PlanError(f"{folder} is not an adapter directory: {error}") from error
    alpha = config.get("lora_alpha", 1)
    entries: list[PlannedSite] = []
    for key, (r, in_features) in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match:
            out_features = shapes[key.replace("lora_A", "lora_B")][0]
            site = Site(match.group(1), in_features, out_features)
            entries.append(PlannedSite(site, r, alpha, r=r, alpha=alpha, score=0.0))
    if not entries:
        raise PlanError(f"{folder} holds no LoRA matrices; its tensors are named {', '.join(list(shapes)[:3])}")
    lora = {field: True for field in ("use_dora", "lora_bias") if config.get(field) is True}
    return AdapterPlan(tuple(entries), lora=lora, rule="adapter", base_model=config.get("base_model_name_or_path"))


def tensor_shapes(folder: Path, file: str = ADAPTER_FILES[1]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter, sorted by name; only the file's header is read."""
    with safe_open(folder / file, framework="numpy") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in sorted(tensors.keys())}
