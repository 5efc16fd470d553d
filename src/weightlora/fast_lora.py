"""The LoRA step without waste, as a PEFT ``LoraVariant``: the same numbers from fewer passes over memory.

    y = W0·x + s·B·A·drop(x)        A (r, in), B (out, r), x (tokens, in)

Stock PEFT lets autograd differentiate this one operation after the other. Here the base layer and its adapter are one
node (``lora_step.py``): it adds to the base output in place, in the backward pass to the base layer's gradient, and
keeps x, r numbers a token and two bytes for each dropped value.

Layers that this does not cover are left to stock PEFT one by one; :func:`fast_coverage` says which, and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from transformers.pytorch_utils import Conv1D

from weightlora.errors import OptionError, SiteError, WeightLoraWarning
from weightlora.gates import Gate
from weightlora.lora_step import Dropout, Fused, Step, without_autocast

_Model = TypeVar("_Model", bound=nn.Module)

_QUANTISED = {"peft.tuners.lora.bnb.Linear8bitLt": "8-bit", "peft.tuners.lora.bnb.Linear4bit": "4-bit"}
_KINDS = {"peft.tuners.lora.layer.Linear", *_QUANTISED}  # by name, so that bitsandbytes need not be there
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Watch:
    """A hook that only looks on: what goes in and comes out stays as it is."""

    see: Callable[[], None]

    def __call__(self, *_: Any) -> None:
        """The hook, of any kind."""
        self.see()


@dataclass(frozen=True)
class Coverage:
    """Which LoRA layers of a model take the fast step; names are those in the base model."""

    covered: tuple[str, ...]
    stock: Mapping[str, str]
    """Layers that stay as PEFT computes them, and why."""


def enable_fast_lora(model: _Model, dropout: Dropout = "input") -> _Model:
    """Make every LoRA step of ``model`` cheaper; return ``model``, changed in place.

    Nothing of it is saved: checkpoints, merging and conversion stay PEFT's. Adapters added later take part once this is
    called again; :func:`disable_fast_lora` takes it off.

    Args:
        model: A PEFT model, planned or not, or any module that PEFT has put LoRA layers into.
        dropout: Where the config's ``lora_dropout`` acts in training. ``"input"`` is PEFT's: each number of x is
            dropped for each adapter. ``"rank"`` drops among the r numbers a token that ``lora_A`` returns (the paper's
            Appendix A): cheaper by far, another regulariser.

    Raises:
        OptionError: ``dropout`` is neither.
        SiteError: The model carries no LoRA layer.

    Warns:
        WeightLoraWarning: Some LoRA layers are not covered and stay as PEFT computes them.

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
        reason = _why_stock(layer, adapter)
        if reason is None:
            layer.lora_variant[adapter] = FastLora(dropout)
        else:
            stock[name] = reason
    if not found:
        raise SiteError(f"{type(model).__name__} carries no LoRA layer; call get_peft_model or plan.attach first")
    if stock:
        warnings.warn(_left_to_peft(stock, len(found)), WeightLoraWarning, stacklevel=2)
    return model


def disable_fast_lora(model: nn.Module) -> None:
    """Take :func:`enable_fast_lora` off without a trace; a model that does not have it stays as it is."""
    for _, layer, adapter in _adapters(model):
        if isinstance(layer.lora_variant.get(adapter), FastLora):
            del layer.lora_variant[adapter]


def fast_dropout(model: nn.Module) -> Dropout | None:
    """Return the ``dropout`` that :func:`enable_fast_lora` was called with; None where it is not on."""
    variants = [layer.lora_variant.get(adapter) for _, layer, adapter in _adapters(model)]
    return next((variant.dropout for variant in variants if isinstance(variant, FastLora)), None)


def fast_coverage(model: nn.Module, adapter: str = "default") -> Coverage:
    """Say which LoRA layers :func:`enable_fast_lora` covers, enabled or not, and why the others are left to PEFT.

    Args:
        model: A PEFT model, or any module that PEFT has put LoRA layers into; only looked at.
        adapter: The adapter's name.
    """
    reasons = {name: _why_stock(layer, which) for name, layer, which in _adapters(model) if which == adapter}
    return Coverage(
        covered=tuple(sorted(name for name, reason in reasons.items() if reason is None)),
        stock={name: reason for name, reason in sorted(reasons.items()) if reason is not None},
    )


@dataclass(frozen=True)
class FastLora(LoraVariant):
    """What PEFT calls in place of its own LoRA arithmetic."""

    dropout: Dropout

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_kwargs: Any) -> None:
        """Nothing to make: the layer keeps PEFT's parameters."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W0 + ΔW, rounded as PEFT does it for plain LoRA."""
        delta: Tensor = module.get_delta_weight(active_adapter)
        if _name(type(module)) in _QUANTISED:
            return orig_weight.to(delta.dtype).to(delta.device) + delta
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """W0 + ΔW in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W0 from W0 + ΔW."""
        delta: Tensor = module.get_delta_weight(active_adapter)
        if _name(type(module)) in _QUANTISED:
            return orig_weight.to(delta.dtype).to(delta.device) - delta
        return orig_weight.data - delta.to(orig_weight.dtype)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_kwargs: Any
    ) -> Tensor:
        """Return ``result``, the base layer's output, with the adapter's added."""
        autocast = torch.is_autocast_enabled(x.device.type)
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if _is_left_to_modules(module, active_adapter) or not (autocast or x.dtype == a.weight.dtype):
            return self._by_modules(module, active_adapter, x, result, autocast=autocast)
        weight, in_place = _base_weight(module, x, result)
        gate = _gate(a)
        closed = gate is not None and gate.omega == 0
        p = _probability(module.lora_dropout[active_adapter])
        omega = 1.0 if gate is None or closed else gate.omega
        step = Step(
            scale=module.scaling[active_adapter] * omega / (1 - p),
            p=p,
            dropout=self.dropout,
            dtype=torch.get_autocast_dtype(x.device.type) if autocast else cast(torch.dtype, a.weight.dtype),
            in_place=in_place,
            narrow=_is_narrow(module, result),
        )
        base = result if weight is None else result.detach()  # the base layer's own graph is not needed
        ear = gate.ear if gate is not None and closed else None
        with without_autocast(x):
            return Fused.apply(base, x, weight, a.weight, b.weight, ear, step)  # pyright: ignore[reportReturnType]

    def _by_modules(self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor, *, autocast: bool) -> Tensor:
        """PEFT's own arithmetic, through the modules and their hooks."""
        a, b, drop = module.lora_A[adapter], module.lora_B[adapter], module.lora_dropout[adapter]
        output = b(a(drop(x)) if self.dropout == "input" else drop(a(x))) * module.scaling[adapter]
        if _name(type(module)) in _QUANTISED and not autocast:  # as PEFT rounds it there
            output = output.to(result.dtype)
        return result + output


def _adapters(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """Every LoRA layer's name in the base model, the layer, and each of its adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in (*layer.lora_A, *layer.lora_embedding_A):
                yield name, layer, adapter


def _why_stock(layer: LoraLayer, adapter: str) -> str | None:
    """Why the adapter stays as PEFT computes it, or None."""
    if _name(type(layer)) not in _KINDS:
        return f"{type(layer).__name__} is no kind of layer that the fast step knows"
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, FastLora):
        return f"it is no plain LoRA but {type(variant).__name__}"
    a, b, drop = (part[adapter] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return "lora_A or lora_B is no nn.Linear"
    if vars(b)["_parameters"]["bias"] is not None:
        return "lora_bias"
    if not isinstance(drop, (nn.Dropout, nn.Identity)):
        return f"its dropout is a {type(drop).__name__}"
    if _is_hooked(b) or _is_hooked(drop) or (_is_hooked(a) and _gate(a) is None):
        return "hooks on lora_A, lora_B or lora_dropout"
    return None


def _is_left_to_modules(layer: LoraLayer, adapter: str) -> bool:
    """Whether this one call takes PEFT's arithmetic: the state of the moment is nothing the fast step covers."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        torch.compiler.is_compiling()  # which fuses PEFT's arithmetic itself
        or active != [adapter]
        or _probability(layer.lora_dropout[adapter]) == 1
        or bool(_has_any_global_hook())
        or _why_stock(layer, adapter) is not None
    )


def _base_weight(layer: LoraLayer, x: Tensor, result: Tensor) -> tuple[Tensor | None, bool]:
    """The frozen weight (out, in) if W0·x is all that the base layer does; whether ``result`` is ours to change."""
    base: Any = layer.base_layer
    if _is_hooked(base) or "forward" in vars(base):  # someone else has a say in the result, and may hold it
        return None, False
    if _name(type(layer)) in _QUANTISED:
        return None, result.is_contiguous() and result._base is None
    if type(base) not in (nn.Linear, Conv1D) or type(base.weight) not in (Tensor, nn.Parameter):
        return None, False
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None, False
    if base.weight.device != x.device or not result.is_contiguous():
        return None, False
    return (base.weight.t() if type(base) is Conv1D else base.weight), True


def _is_narrow(layer: LoraLayer, result: Tensor) -> bool:
    """Whether the base layer's own input had the type of its output, before PEFT gave it the adapter's."""
    base: Any = layer.base_layer
    if _name(type(layer)) in _QUANTISED:
        return True
    if type(base) not in (nn.Linear, Conv1D) or "forward" in vars(base) or base.weight.dtype != result.dtype:
        return False
    return all(isinstance(hook, Watch) for hook in vars(base)["_forward_pre_hooks"].values())


def _probability(drop: nn.Module) -> float:
    return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0


def _gate(a: nn.Module) -> Gate | None:
    """The gate on ``lora_A`` when it is the only hook there."""
    if not _is_hooked(a):
        return None
    match [hook for kind in _HOOKS for hook in vars(a)[kind].values()]:
        case [Gate() as gate]:
            return gate
        case _:
            return None


def _is_hooked(module: nn.Module) -> bool:
    own = vars(module)  # asked several times a layer and step: no loop
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _left_to_peft(stock: Mapping[str, str], count: int) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(stock.items())[:5])
    more = f"; and {len(stock) - 5} more" if len(stock) > 5 else ""
    return f"{len(stock)} of {count} LoRA layers stay as PEFT computes them ({shown}{more})"
