"""Where a plan comes from: the name of its base model and the versions of the libraries."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.files import write_text

if TYPE_CHECKING:
    from torch import nn


def base_model_name(model: nn.Module) -> str | None:
    """The name or path that a transformers model, with or without adapters, was loaded from; None where it has none."""
    from peft import PeftModel
    from transformers import PretrainedConfig

    config: Any = vars(model.get_base_model() if isinstance(model, PeftModel) else model).get("config")
    return (config.name_or_path or None) if isinstance(config, PretrainedConfig) else None


def write_base_model_name(folder: Path, model: nn.Module) -> None:
    """Write the name of ``model``'s base into a saved adapter: its configuration and its card.

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
    card = folder / "README.md"
    if card.exists():
        write_text(card, card.read_text(encoding="utf-8").replace(written, name))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a selection, read without importing them."""
    return {name: version(name) for name in ("weightlora", "torch", "transformers", "peft")}
