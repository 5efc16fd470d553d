"""Let the backward pass end at the lowest adapter, with gradient checkpointing as without.

Where gradient checkpointing is switched on, transformers, PEFT and TRL call ``enable_input_require_grads``: a hook
makes the embeddings' output want a gradient. Reentrant checkpointing finds nothing to differentiate without it. For the
non-reentrant kind, transformers' default, it only makes the backward pass run through every layer, recomputing them on
the way, however high the lowest adapter stands.
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
#: What the hook is called in transformers and in PEFT and TRL; it bears no other mark.
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def shorten_backward(model: _Model) -> _Model:
    """Let the backward pass end at the lowest adapter; return ``model``, changed in place.

    The hooks of ``enable_input_require_grads`` are taken off, which changes no gradient of an adapter. A trainer puts
    them on again when its training starts: after ``select_for`` that is seen to.

    Args:
        model: Any model with adapters, after gradient checkpointing was switched on.

    Warns:
        WeightLoraWarning: Its checkpointing is reentrant, or of a kind that is not known, and needs them.

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
    if not release_inputs(model):
        warnings.warn(
            "gradient checkpointing is reentrant here, so that the backward pass runs through all layers down to the "
            "embeddings, whatever was selected; give activation_checkpointing_kwargs={'use_reentrant': False}",
            WeightLoraWarning,
            stacklevel=2,
        )
    return model


def release_inputs(model: nn.Module) -> bool:
    """Take the hooks off unless the checkpointing needs them; return whether none is left."""
    found = list(_input_hooks(model))
    if found and _may_be_reentrant(model):
        return False
    for hooks, key in found:  # not by their handles: of two that were set, transformers keeps the last one's alone
        del hooks[key]
    return True


def _input_hooks(model: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """The hooks that make an output want a gradient, each with the dictionary that it stands in."""
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
