"""End the backward pass at the lowest adapter under gradient checkpointing.

With gradient checkpointing, transformers, PEFT and TRL call ``enable_input_require_grads``: a hook makes the output of
the embeddings require a gradient. Reentrant checkpointing needs that. Non-reentrant checkpointing, transformers'
default, does not: there the hook only makes the backward pass run through, and recompute, all layers below the lowest
adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from weightlora.errors import WeightLoraWarning
from weightlora.model.torch_private import forward_hooks

_Model = TypeVar("_Model", bound=nn.Module)
#: Names of the hook in transformers and in PEFT and TRL; nothing else identifies it.
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def shorten_backward(model: _Model) -> _Model:
    """End the backward pass at the lowest adapter; return ``model``, changed in place.

    It removes the hooks of ``enable_input_require_grads``, which changes no gradient of an adapter. A trainer sets them
    again when its training starts; after ``select_for`` or ``method_for`` they are then removed again.

    Args:
        model: Any model with adapters, after gradient checkpointing was switched on.

    Warns:
        WeightLoraWarning: Its checkpointing is reentrant, or of an unknown kind, and needs the hooks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model.activation_checkpointing_enable()
        >>> len(model.model.embed_tokens._forward_hooks)
        1
        >>> len(shorten_backward(model).model.embed_tokens._forward_hooks)
        0
    """
    if not remove_input_hooks(model):
        warnings.warn(
            "gradient checkpointing is reentrant here, so the backward pass runs through all layers down to the "
            "embeddings; give activation_checkpointing_kwargs={'use_reentrant': False}",
            WeightLoraWarning,
            stacklevel=2,
        )
    return model


def remove_input_hooks(model: nn.Module) -> bool:
    """Remove the hooks unless the checkpointing needs them; return whether none is left."""
    found = list(_input_hooks(model))
    if found and _may_be_reentrant(model):
        return False
    for hooks, key in found:  # not by a handle: transformers keeps only the handle of the last one set
        del hooks[key]
    return True


def _input_hooks(model: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """The hooks that make an output require a gradient, each as its dictionary and key."""
    for module in model.modules():
        hooks: dict[int, Any] = forward_hooks(module)
        for key, hook in list(hooks.items()):
            if isinstance(hook, FunctionType) and hook.__name__ in _HOOKS:
                yield hooks, key


def _may_be_reentrant(model: nn.Module) -> bool:
    """Whether a checkpointed layer's function is anything but ``partial(checkpoint, use_reentrant=False)``."""
    for module in model.modules():
        attributes = vars(module)
        if attributes.get("gradient_checkpointing"):
            function = attributes.get("_gradient_checkpointing_func")
            if not isinstance(function, partial) or function.keywords.get("use_reentrant") is not False:
                return True
    return False
