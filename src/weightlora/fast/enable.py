"""Enable and disable the fast LoRA step for a whole model: the same numbers from fewer passes over memory.

    y = W0·x + s·B·A·drop(x)        A (r, in), B (out, r), x (tokens, in)

Stock PEFT lets autograd differentiate each operation of this. Here one autograd function (``_step.py``) computes base
layer and adapter: it adds to the base output, and in the backward pass to the base gradient, in place. It saves x, r
numbers per token and two bytes for each dropped value.

PEFT computes the layers that this does not cover; :func:`fast_coverage` lists them with the reason. PEFT also computes
small calls, such as generating token by token (``LEAST_NUMBERS`` in ``_layer.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, get_args

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from weightlora.errors import OptionError, SiteError, WeightLoraWarning
from weightlora.fast._layer import FastLora, why_stock
from weightlora.fast.dropout import Dropout

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Coverage:
    """Which LoRA layers of a model use the fast step, by their names in the base model."""

    covered: tuple[str, ...]
    stock: Mapping[str, str]
    """Layers that PEFT computes, and why."""


def enable_fast_lora(model: _Model, dropout: Dropout = "input") -> _Model:
    """Use the fast LoRA step in ``model``; return ``model``, changed in place.

    Checkpoints, merging and conversion stay PEFT's; nothing of the fast step is saved. Call it again after adding
    adapters; :func:`disable_fast_lora` undoes it.

    Args:
        model: A PEFT model, planned or not, or any module that PEFT has put LoRA layers into.
        dropout: Where the config's ``lora_dropout`` acts in training. ``"input"`` is PEFT's: on each number of x, for
            each adapter. ``"rank"`` acts on the r numbers per token that ``lora_A`` returns (the paper's Appendix A):
            much cheaper, and a different regulariser.

    Raises:
        OptionError: ``dropout`` is neither.
        SiteError: The model carries no LoRA layer.

    Warns:
        WeightLoraWarning: Some LoRA layers are not covered; PEFT computes them.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> stock = model(torch.ones(1, 4))
        >>> torch.testing.assert_close(enable_fast_lora(model)(torch.ones(1, 4)), stock)
        >>> fast_coverage(model).covered
        ('0',)
    """
    if dropout not in get_args(Dropout):
        raise OptionError(f"dropout={dropout!r} is not allowed: give {' or '.join(get_args(Dropout))}")
    stock: dict[str, str] = {}
    found = list(_adapters(model))
    for name, layer, adapter in found:
        reason = why_stock(layer, adapter)
        if reason is None:
            layer.lora_variant[adapter] = FastLora(dropout)
        else:
            stock[name] = reason
    if not found:
        raise SiteError(f"{type(model).__name__} carries no LoRA layer; call get_peft_model or plan.attach first")
    if stock:
        warnings.warn(_not_covered(stock, len(found)), WeightLoraWarning, stacklevel=2)
    return model


def disable_fast_lora(model: nn.Module) -> None:
    """Undo :func:`enable_fast_lora`; a model without it is left unchanged."""
    for _, layer, adapter in _adapters(model):
        if isinstance(layer.lora_variant.get(adapter), FastLora):
            del layer.lora_variant[adapter]


def fast_dropout(model: nn.Module) -> Dropout | None:
    """Return the ``dropout`` given to :func:`enable_fast_lora`; None if it is not enabled."""
    variants = [layer.lora_variant.get(adapter) for _, layer, adapter in _adapters(model)]
    return next((variant.dropout for variant in variants if isinstance(variant, FastLora)), None)


def fast_coverage(model: nn.Module, adapter: str = "default") -> Coverage:
    """Return which LoRA layers :func:`enable_fast_lora` covers, enabled or not, and why PEFT computes the others.

    Args:
        model: A PEFT model, or any module that PEFT has put LoRA layers into; it is not changed.
        adapter: The adapter's name.
    """
    reasons = {name: why_stock(layer, which) for name, layer, which in _adapters(model) if which == adapter}
    return Coverage(
        covered=tuple(sorted(name for name, reason in reasons.items() if reason is None)),
        stock={name: reason for name, reason in sorted(reasons.items()) if reason is not None},
    )


def _adapters(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """Each adapter of each LoRA layer: the layer's name in the base model, the layer, the adapter's name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in (*layer.lora_A, *layer.lora_embedding_A):
                yield name, layer, adapter


def _not_covered(stock: Mapping[str, str], count: int) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(stock.items())[:5])
    more = f"; and {len(stock) - 5} more" if len(stock) > 5 else ""
    return f"the fast step does not cover {len(stock)} of {count} LoRA layers; PEFT computes them ({shown}{more})"
