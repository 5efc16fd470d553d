"""The adapter layers inside a model, by their names in the base model."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.vblora.layer import VBLoRALayer
from peft.tuners.vera.layer import VeraLayer
from torch import nn


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Return the layers of ``model`` that carry ``adapter``, by their name in the base model, sorted.

    Args:
        model: A PEFT model, or any module that PEFT has put LoRA layers into.
        adapter: The adapter's name.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}
    return dict(sorted(found.items()))


def adapter_layers(model: nn.Module, adapter: str = "default") -> dict[str, BaseTunerLayer]:
    """Return what :func:`lora_layers` returns, and the layers of PEFT's VeRA and VB-LoRA; all have ``r`` by adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = (VeraLayer, VBLoRALayer)
    others = {name: m for name, m in base.named_modules() if isinstance(m, kinds) and adapter in m.r}
    return dict(sorted({**lora_layers(model, adapter), **others}.items()))


def without_adapters(model: nn.Module) -> nn.Module:
    """Take the adapters off a PEFT model and return its base model; return any other model unchanged."""
    if not isinstance(model, PeftModel):
        return model
    tuner: Any = model.base_model
    return tuner.unload() if isinstance(tuner, BaseTuner) else model.get_base_model()
