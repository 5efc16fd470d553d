"""A model's modules as PEFT sees them: what it adapts under a ``LoraConfig``, what it refuses, what has no effect."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, SiteError, WeightLoraWarning
from weightlora.text import closest

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

#: Modules that a warning names.
_SHOWN = 3

# -- the modules -------------------------------------------------------------------------------------------------------


def base_of(model: nn.Module) -> nn.Module:
    """The base model of a PEFT model; any other model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def config_of(model: nn.Module) -> PretrainedConfig | None:
    """The configuration of a transformers model, with or without adapters; None for all other modules."""
    from transformers import PretrainedConfig

    config: Any = vars(base_of(model)).get("config")
    return config if isinstance(config, PretrainedConfig) else None


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_modules()`` of the base model yielded before PEFT wrapped parts of it."""
    yield from _unwrapped("", base_of(model), set())


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is one of the layers that are candidates."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features), also for GPT-2's transposed layer."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    return int(layer.in_features), int(layer.out_features)  # pyright: ignore[reportArgumentType]


def returns_tensor(layer: nn.Module) -> bool:
    """Whether a linear layer returns one tensor, which PEFT adds to; Llama 4's router, a subclass, returns two.

    A subclass with a ``forward`` of its own is called with a row of zeros, unless its weight is of a special type.
    """
    import torch
    from torch import nn

    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    weight: torch.Tensor = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return True
    forward: Any = type(layer).forward
    try:
        with torch.no_grad():
            result: Any = forward(layer, weight.new_zeros(1, weight.shape[-1]))
    except Exception:  # it wants other inputs, so nothing is known
        return True
    return isinstance(result, torch.Tensor)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to token logits; None outside transformers."""
    from transformers import PreTrainedModel

    base = base_of(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    return None if head is None else _without_wrappers(head)


def _unwrapped(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = _without_wrappers(module)
    if id(module) in seen:  # modules that are shared have the first of their names, as in named_modules()
        return
    seen.add(id(module))
    yield name, module
    for child, inner in module.named_children():
        yield from _unwrapped(f"{name}.{child}" if name else child, inner, seen)


def _without_wrappers(module: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


# -- what PEFT makes of a config ---------------------------------------------------------------------------------------


def require_patterns(lora: LoraConfig) -> None:
    """Raise where an option of ``lora`` that PEFT reads as a regular expression is none.

    Raises:
        SiteError: With the option and the reason.
    """
    whole = {"target_modules": lora.target_modules, "exclude_modules": lora.exclude_modules}
    all_patterns = {option: [value] for option, value in whole.items() if isinstance(value, str)}
    all_patterns |= {"rank_pattern": [*(lora.rank_pattern or ())], "alpha_pattern": [*(lora.alpha_pattern or ())]}
    for option, patterns in all_patterns.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                reason = f"which is no regular expression ({error}); correct it"
                raise SiteError(f"{option} has {pattern!r}, {reason}") from error


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

    config, ends = config_of(base), {name: name.rsplit(".", 1)[-1] for name in candidates}
    one_of = {type(layer): layer for layer in candidates.values()}
    with seeded(0):
        by_end = {end: _reason(config.model_type, end) for end in sorted(set(ends.values()))} if config else {}
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


# -- what of a config has no effect ------------------------------------------------------------------------------------


def unmatched_targets(
    lora: LoraConfig,
    read: LoraConfig,
    modules: Iterable[str],
    linear: Collection[str],
    parameters: Collection[str],
) -> dict[str, str]:
    """The listed target parameters that the model has not, each with a reason to skip it.

    Args:
        lora: The wanted adapters.
        read: The same as PEFT reads it; names of fused experts are parameters there.
        modules: Names of all modules.
        linear: Names of the linear layers, among which the closest name is looked for.
        parameters: Names of the parameters that get an adapter.

    Raises:
        SiteError: An entry of the list ``target_modules`` is the name or the ending of no module.
    """
    missing = set(_missing(lora.target_modules, modules))
    if parameters:  # names of fused experts, which are no modules
        missing &= set(read.target_modules or ())
    if missing:
        named = ", ".join(f"{entry!r}{_hint(entry, linear)}" for entry in sorted(missing)[:_SHOWN])
        raise SiteError(f"target_modules: no module is named {named}; correct the name, or leave it out")
    wanted = sorted(lora.target_parameters or ())
    nowhere = [entry for entry in wanted if not any(f".{name}".endswith(f".{entry}") for name in parameters)]
    return dict.fromkeys(nowhere, "no parameter has this name")


def warn_of_leftovers(
    lora: LoraConfig,
    left_out: Mapping[str, str],
    modules: Iterable[str],
    sites: Sequence[str],
    parameters: Collection[str],
) -> None:
    """Warn where a part of ``lora`` has no effect.

    Args:
        lora: The wanted adapters.
        left_out: Modules and names that ``lora`` asks for and that get no adapter, with the reasons.
        modules: Names of all modules.
        sites: Names of the candidates.
        parameters: Names of the parameters that get an adapter.
    """
    if left_out:
        named = [f"{name}: {reason}" for name, reason in left_out.items()]
        if lora.target_modules is None:
            _warn(
                f"some linear layers get no adapter ({_few(named)}); exclude_modules leaves them out without a warning"
            )
        else:
            _warn(f"target_modules asks for modules that get no adapter ({_few(named)}); change target_modules")
    excluded = [f"{entry!r}{_hint(entry, sites)}" for entry in _missing(lora.exclude_modules, modules)]
    if excluded:
        _warn(f"exclude_modules has names that no module has ({_few(excluded)}); change or remove them")
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        unused = [f"{key!r}{_hint(key, sites)}" for key in patterns or () if not _reaches(key, [*sites, *parameters])]
        if unused:
            _warn(f"{field} has keys that match no site ({_few(unused)}); change or remove them")


def _missing(entries: str | Collection[str] | None, modules: Iterable[str]) -> list[str]:
    """The entries of a list that PEFT would find nowhere; a regular expression has none."""
    if entries is None or isinstance(entries, str):
        return []
    endings = {".".join(parts[i:]) for name in modules for parts in [name.split(".")] for i in range(len(parts))}
    return sorted(set(entries) - endings)


def _reaches(key: str, sites: Iterable[str]) -> bool:
    from peft.utils.other import get_pattern_key

    # Where no key matches, the function returns the name itself.
    return any(get_pattern_key([key], name) == key for name in sites)


def _hint(entry: str, names: Iterable[str]) -> str:
    """The closest of the names' endings with as many parts as the entry has."""
    parts = entry.count(".") + 1
    return closest(entry, {".".join(name.split(".")[-parts:]) for name in names})


def _few(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def _warn(text: str) -> None:
    warnings.warn(text, WeightLoraWarning, stacklevel=4)
