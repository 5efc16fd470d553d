"""Enable and disable the fast LoRA step for a whole model: the same numbers from fewer passes over memory.

    y = W0·x + s·B·A·drop(x)        A (r, in), B (out, r), x (tokens, in)

Stock PEFT lets autograd differentiate each operation of this. Here one autograd function (``step.py``) computes base
layer and adapter: it adds to the base output, and in the backward pass to the base gradient, in place. It saves x, r
numbers per token and two bytes for each dropped value.

PEFT computes the layers that this does not cover; :func:`fast_coverage` lists them with the reason. PEFT also computes
small calls, such as generating token by token (``LEAST_NUMBERS``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weightlora.errors import OptionError, SiteError, WeightLoraWarning
from weightlora.fast.step import Dropout, Fused, Step, without_autocast
from weightlora.model.gates import Gate
from weightlora.model.torch_private import (
    has_global_hooks,
    hooks_of,
    is_hooked,
    is_intercepted,
    is_view,
    keeps_input,
    own_parameter,
)

_Model = TypeVar("_Model", bound=nn.Module)
#: With fewer numbers in x, PEFT's arithmetic is faster, for example when generating token by token: there an autograd
#: function in Python costs more than it saves. It saves more where dropout acts on x.
LEAST_NUMBERS, LEAST_WITH_INPUT_DROPOUT = 2**16, 2**14
#: By name, so that bitsandbytes need not be installed.
_QUANTISED = {"peft.tuners.lora.bnb.Linear8bitLt", "peft.tuners.lora.bnb.Linear4bit"}


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


# -- one layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastLora(LoraVariant):
    """PEFT calls this instead of its own LoRA arithmetic."""

    dropout: Dropout

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_kwargs: Any) -> None:
        """Do nothing: the layer keeps PEFT's parameters."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return W0 + ΔW, rounded as PEFT does for plain LoRA."""
        return _added(orig_weight, module, module.get_delta_weight(active_adapter))

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Change W0 to W0 + ΔW in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return W0, given W0 + ΔW."""
        return _added(orig_weight.data, module, -module.get_delta_weight(active_adapter))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_kwargs: Any
    ) -> Tensor:
        """Return the base layer's output ``result`` plus the adapter's output."""
        autocast = torch.is_autocast_enabled(x.device.type)
        if self._is_stock_call(module, active_adapter, x, autocast=autocast):
            return self._stock(module, active_adapter, x, result, autocast=autocast)
        return self._fused(module, active_adapter, x, result, autocast=autocast)

    def _fused(self, module: Any, adapter: str, x: Tensor, result: Tensor, *, autocast: bool) -> Tensor:
        """The base layer's output plus the adapter's, as one autograd function."""
        weight = _frozen_weight(module, x)
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        gate = _gate(a)
        closed = gate is not None and gate.omega == 0
        p = _probability(module.lora_dropout[adapter])
        omega = 1.0 if gate is None or closed else gate.omega
        step = Step(
            scale=module.scaling[adapter] * omega / (1 - p),
            p=p,
            dropout=self.dropout,
            dtype=torch.get_autocast_dtype(x.device.type) if autocast else cast(torch.dtype, a.weight.dtype),
            in_place=_is_ours(module, result, weight),
            narrow=_is_narrow(module, result),
        )
        base = result if weight is None else result.detach()  # its own graph is not needed
        leaf = gate.leaf if gate is not None and closed else None
        with without_autocast(x):
            return Fused.apply(base, x, weight, a.weight, b.weight, leaf, step)  # pyright: ignore[reportReturnType]

    def _is_stock_call(self, module: LoraLayer, adapter: str, x: Tensor, *, autocast: bool) -> bool:
        """Whether this call keeps PEFT's arithmetic: x is too small, or the fast step does not cover the call."""
        p = _probability(module.lora_dropout[adapter])
        return (
            torch.compiler.is_compiling()  # which fuses PEFT's arithmetic itself
            or _is_small(x, drops=p > 0 and self.dropout == "input")
            or [name for name in module.active_adapters if name in module.lora_A] != [adapter]
            or p == 1
            or has_global_hooks()
            or not (autocast or x.dtype == module.lora_A[adapter].weight.dtype)
            or why_stock(module, adapter) is not None
        )

    def _stock(self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor, *, autocast: bool) -> Tensor:
        """PEFT's arithmetic, through the modules and their hooks."""
        a, b, drop = module.lora_A[adapter], module.lora_B[adapter], module.lora_dropout[adapter]
        output = b(a(drop(x)) if self.dropout == "input" else drop(a(x))) * module.scaling[adapter]
        if not autocast and _is_quantised(module):  # as PEFT rounds it there
            output = output.to(result.dtype)
        return result + output


def _added(weight: Tensor, module: object, delta: Tensor) -> Tensor:
    """The weight plus ``delta``, in the type of the weight, or of ``delta`` where the weight was dequantised."""
    if _is_quantised(module):
        return weight.to(delta.dtype).to(delta.device) + delta
    return weight + delta.to(weight.dtype)


def why_stock(layer: LoraLayer, adapter: str) -> str | None:
    """Why PEFT computes this adapter, or None where the fast step does."""
    if type(layer) is not Linear and not _is_quantised(layer):
        return f"layer type {type(layer).__name__}"
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, FastLora):
        return f"{type(variant).__name__} instead of plain LoRA"
    a, b, drop = (part[adapter] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return "lora_A or lora_B is not an nn.Linear"
    if own_parameter(b, "bias") is not None:
        return "lora_bias"
    if not isinstance(drop, (nn.Dropout, nn.Identity)):
        return f"its dropout is a {type(drop).__name__}"
    if is_hooked(b) or is_hooked(drop) or (is_hooked(a) and _gate(a) is None):
        return "hooks on lora_A, lora_B or lora_dropout"
    return None


def _is_small(x: Tensor, *, drops: bool) -> bool:
    """Whether PEFT's arithmetic is faster; ``drops`` says whether dropout acts on x."""
    return x.numel() < (LEAST_WITH_INPUT_DROPOUT if drops else LEAST_NUMBERS)


def _frozen_weight(layer: LoraLayer, x: Tensor) -> Tensor | None:
    """The weight (out, in) of a frozen base layer that computes just W0·x + bias; None for any other layer."""
    base: Any = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or type(base.weight) not in (Tensor, nn.Parameter):
        return None
    if is_intercepted(base) or base.weight.device != x.device:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return base.weight.t() if type(base) is Conv1D else base.weight


def _is_ours(layer: LoraLayer, result: Tensor, weight: Tensor | None) -> bool:
    """Whether only this call holds ``result``, so that it may be changed in place."""
    if weight is not None:
        return result.is_contiguous()
    dequantised = _is_quantised(layer) and not is_intercepted(layer.base_layer)
    return dequantised and result.is_contiguous() and not is_view(result)


def _is_narrow(layer: LoraLayer, result: Tensor) -> bool:
    """Whether the base layer's input had the dtype of its output, before PEFT cast it to the adapter's."""
    base: Any = layer.base_layer
    if _is_quantised(layer):
        return True
    plain = type(base) in (nn.Linear, Conv1D) and "forward" not in vars(base)
    return plain and base.weight.dtype == result.dtype and keeps_input(base)


def _probability(drop: nn.Module) -> float:
    return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0


def _gate(a: nn.Module) -> Gate | None:
    """The gate on ``lora_A`` if it is the only hook there."""
    hooks = hooks_of(a) if is_hooked(a) else []
    return hooks[0] if len(hooks) == 1 and isinstance(hooks[0], Gate) else None


def _is_quantised(layer: object) -> bool:
    return f"{type(layer).__module__}.{type(layer).__qualname__}" in _QUANTISED
