"""What PEFT makes of a layer's name in a model of some type: some names it refuses, some it reads as fused experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.model._modules import returns_tensor

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def read_by_peft(base: nn.Module, lora: LoraConfig) -> LoraConfig:
    """Return ``lora`` as PEFT reads it for ``base``: names of experts that transformers fused become parameters.

    Raises:
        OptionError: The config names some of the layers that are fused into one parameter, and not the others.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = deepcopy(lora)
    if lora.target_modules is None:  # every linear layer, instead of PEFT's default names
        return read
    try:
        convert_peft_config_for_transformers(read, base, None)
    except ValueError as error:
        raise OptionError(f"target_modules: {one_line(error)}; name all of them, or none") from error
    return read


def refused_layers(base: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers on which PEFT puts no working adapter, and why.

    Args:
        base: The base model; for some types PEFT refuses or rewrites a layer by the last part of its name.
        candidates: Linear layers by name.
    """
    from weightlora.model.restore import seeded

    kind, ends = _model_type(base), {name: name.rsplit(".", 1)[-1] for name in candidates}
    one_of = {type(layer): layer for layer in candidates.values()}
    with seeded(0):
        by_end = {} if kind is None else {end: _reason(kind, end) for end in sorted(set(ends.values()))}
        odd = {own for own, layer in one_of.items() if not returns_tensor(layer)}
    reasons = {
        name: f"{type(layer).__name__} returns more than one tensor" if type(layer) in odd else by_end.get(ends[name])
        for name, layer in candidates.items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def require_adaptable_parameters(lora: LoraConfig, names: Iterable[str]) -> None:
    """Raise if PEFT adapts no parameter under ``lora``: it refuses dropout and DoRA there, among others.

    Args:
        lora: The wanted adapters.
        names: The parameters, for the error.

    Raises:
        OptionError: With PEFT's reason.
    """
    from peft import inject_adapter_in_model

    from weightlora.model.restore import seeded

    asked = replace(lora, target_modules=[], exclude_modules=None, target_parameters=["layer.weight"])
    asked.rank_pattern, asked.alpha_pattern = {}, {}
    asked.modules_to_save = asked.trainable_token_indices = asked.layers_to_transform = None
    asked.init_lora_weights = False
    try:
        with seeded(0):
            inject_adapter_in_model(asked, _one_layer("layer"))
    except ValueError as error:
        raise OptionError(
            f"PEFT cannot adapt parameters such as {min(names)} under this config: {one_line(error)}; change that "
            "field, or leave the parameters out of target_modules and target_parameters"
        ) from error


def one_line(error: Exception) -> str:
    """The text of a PEFT error without line breaks and without its last point."""
    return " ".join(str(error).split()).rstrip(".")


def _reason(kind: str, end: str) -> str | None:
    """Why PEFT puts no adapter on a layer of this name; it is asked with a model of one layer."""
    from peft import LoraConfig, inject_adapter_in_model

    model = _one_layer(end, SimpleNamespace(model_type=kind))
    asked = LoraConfig(r=1, target_modules=[end])
    try:
        if end not in (read_by_peft(model, asked).target_modules or ()):
            raise OptionError(end)
    except OptionError:
        return f"in models of type {kind!r} PEFT reads {end!r} as a part of the fused experts"
    try:
        inject_adapter_in_model(asked, model)
    except ValueError:
        return f"PEFT refuses {end!r} in models of type {kind!r}"
    return None


def _one_layer(name: str, config: Any = None) -> nn.Module:
    from torch import nn

    model: Any = nn.Module()
    setattr(model, name, nn.Linear(1, 1))
    model.config = config
    return model


def _model_type(base: nn.Module) -> str | None:
    """``model_type`` of a transformers model; None for all other modules."""
    from transformers import PretrainedConfig

    config: Any = vars(base).get("config")
    return str(config.model_type) if isinstance(config, PretrainedConfig) else None
