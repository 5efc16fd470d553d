"""The modules of a base model, seen through PEFT's wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_modules()`` of the base model yielded before PEFT wrapped parts of it."""
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    yield from _unwrapped("", base, set())


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
    from peft import PeftModel
    from transformers import PreTrainedModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
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
