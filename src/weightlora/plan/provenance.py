"""Where a plan comes from: the name of its base model and the versions of the libraries."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.files import write_text
from weightlora.model.modules import base_of, config_of

if TYPE_CHECKING:
    from torch import nn


def base_model_name(model: nn.Module) -> str | None:
    """The name or path that a transformers model, with or without adapters, was loaded from; None where it has none."""
    config = config_of(model)
    return None if config is None else config.name_or_path or None


def write_base_model_name(folder: Path, model: nn.Module) -> None:
    """Write the name of ``model``'s base into the configuration of a saved adapter.

    PEFT writes the path of the files that were loaded, which for an embedded model is a folder of this machine.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote; without a configuration in it, nothing is done.
        model: The model that was saved.
    """
    name, file = base_model_name(model), folder / "adapter_config.json"
    if not file.exists():
        return
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    written = config.get("base_model_name_or_path")
    if name is None or written is None or written == name:
        return
    config["base_model_name_or_path"] = name
    write_text(file, json.dumps(config, indent=2, sort_keys=True))  # as PEFT writes it


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's classes in their order; () where they are only transformers' LABEL_0, LABEL_1, ..."""
    config = config_of(model)
    given: Any = (config.id2label if config else None) or {}
    names = [str(name) for _, name in sorted((int(number), name) for number, name in given.items())]
    return () if names == [f"LABEL_{number}" for number in range(len(names))] else tuple(names)


def is_from_gguf(model: nn.Module) -> bool:
    """Whether a model's weights were read from a GGUF file of this machine, which rounds them."""
    from transformers import PreTrainedModel

    base = base_of(model)
    return isinstance(base, PreTrainedModel) and any(Path(base.name_or_path or "nowhere").glob("*.gguf"))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a selection, read without importing them."""
    return {name: version(name) for name in ("weightlora", "torch", "transformers", "peft")}
