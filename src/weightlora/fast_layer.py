"""One LoRA layer's step without waste: what PEFT asks in place of its own arithmetic, and when it is asked.

PEFT asks a variant once the base layer has run. On a CPU the two are sooner done together: the adapter's product is
what W0·x is added to, both are one through W0 + s·B·A, or oneDNN computes them (``onednn.py``). So the layer itself is
a :class:`FastLinear` meanwhile, which leaves all but the plain case to PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from transformers.pytorch_utils import Conv1D

from weightlora.gates import Gate
from weightlora.lora_step import Dropout, Fused, Step, without_autocast

#: Numbers in x below which PEFT's way is the quicker, as for a token being generated: a node written in Python takes
#: longer than what it saves. Where numbers of x are dropped, it saves more.
LEAST_NUMBERS, LEAST_WITH_INPUT_DROPOUT = 2**16, 2**14
#: By name, so that bitsandbytes need not be there.
_QUANTISED = {"peft.tuners.lora.bnb.Linear8bitLt", "peft.tuners.lora.bnb.Linear4bit"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Watch:
    """A hook that only looks on: what goes in and comes out stays as it is."""

    see: Callable[[], None]

    def __call__(self, *_: Any) -> None:
        """The hook, of any kind."""
        self.see()


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
        if self.leaves_to_peft(module, active_adapter, x, autocast=autocast):
            return self._by_modules(module, active_adapter, x, result, autocast=autocast)
        return self.fused(module, active_adapter, x, result, _frozen_weight(module, x))

    def fused(self, module: Any, adapter: str, x: Tensor, result: Tensor | None, weight: Tensor | None) -> Tensor:
        """Return base layer and adapter as one node (``lora_step.py``), the former's output made there if not given."""
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        gate = _gate(a)
        closed = gate is not None and gate.omega == 0
        p = _probability(module.lora_dropout[adapter])
        omega = 1.0 if gate is None or closed else gate.omega
        autocast = torch.is_autocast_enabled(x.device.type)
        step = Step(
            scale=module.scaling[adapter] * omega / (1 - p),
            p=p,
            dropout=self.dropout,
            dtype=torch.get_autocast_dtype(x.device.type) if autocast else cast(torch.dtype, a.weight.dtype),
            in_place=result is not None and _is_ours(module, result, weight),
            narrow=result is not None and _is_narrow(module, result),
        )
        base = result if weight is None or result is None else result.detach()  # its own graph is not needed
        bias = module.base_layer.bias if result is None else None
        ear = gate.ear if gate is not None and closed else None
        with without_autocast(x):
            return Fused.apply(base, x, weight, bias, a.weight, b.weight, ear, step)  # pyright: ignore[reportReturnType]

    def leaves_to_peft(self, module: LoraLayer, adapter: str, x: Tensor, *, autocast: bool) -> bool:
        """Whether this one call takes PEFT's arithmetic: it is too small, or nothing that the fast step covers."""
        p = _probability(module.lora_dropout[adapter])
        return (
            torch.compiler.is_compiling()  # which fuses PEFT's arithmetic itself
            or _is_small(x, drops=p > 0 and self.dropout == "input")
            or [name for name in module.active_adapters if name in module.lora_A] != [adapter]
            or p == 1
            or bool(_has_any_global_hook())
            or not (autocast or x.dtype == module.lora_A[adapter].weight.dtype)
            or why_stock(module, adapter) is not None
        )

    def _by_modules(self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor, *, autocast: bool) -> Tensor:
        """PEFT's own arithmetic, through the modules and their hooks."""
        a, b, drop = module.lora_A[adapter], module.lora_B[adapter], module.lora_dropout[adapter]
        output = b(a(drop(x)) if self.dropout == "input" else drop(a(x))) * module.scaling[adapter]
        if not autocast and _name(type(module)) in _QUANTISED:  # as PEFT rounds it there
            output = output.to(result.dtype)
        return result + output


class FastLinear(Linear):
    """PEFT's layer while the fast step is on: on a CPU it makes its base's output itself, unless that is watched."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's layer returns, in each of its modes."""
        plain = x.is_cpu and not (args or kwargs or torch.compiler.is_compiling() or _is_small(x, drops=True))
        weight = _frozen_weight(self, x) if plain else None
        adapter = None if weight is None else _alone(self, x)
        if weight is None or adapter is None:
            return super().forward(x, *args, **kwargs)
        return cast(FastLora, self.lora_variant[adapter]).fused(self, adapter, x, None, weight)


def why_stock(layer: LoraLayer, adapter: str) -> str | None:
    """Why the adapter stays as PEFT computes it, or None."""
    if type(layer) not in (Linear, FastLinear) and _name(type(layer)) not in _QUANTISED:
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


def _alone(layer: Linear, x: Tensor) -> str | None:
    """The adapter of this call, where the fast step covers it and there is no other."""
    if layer.merged or layer.disable_adapters or torch.is_autocast_enabled("cpu"):
        return None
    names = [name for name in layer.active_adapters if isinstance(layer.lora_variant.get(name), FastLora)]
    if not names:
        return None
    variant = cast(FastLora, layer.lora_variant[names[0]])
    return None if variant.leaves_to_peft(layer, names[0], x, autocast=False) else names[0]


def _is_small(x: Tensor, *, drops: bool) -> bool:
    """Whether PEFT's way is the quicker; ``drops`` says that numbers of x are dropped."""
    return x.numel() < (LEAST_WITH_INPUT_DROPOUT if drops else LEAST_NUMBERS)


def _frozen_weight(layer: LoraLayer, x: Tensor) -> Tensor | None:
    """The weight (out, in) of a frozen base layer that computes W0·x + bias, and nothing that others have a say in."""
    base: Any = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or type(base.weight) not in (Tensor, nn.Parameter):
        return None
    if _is_watched(base) or base.weight.device != x.device:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return base.weight.t() if type(base) is Conv1D else base.weight


def _is_ours(layer: LoraLayer, result: Tensor, weight: Tensor | None) -> bool:
    """Whether the base layer has made ``result`` for this call alone, so that it may be changed in place."""
    if weight is None and (_name(type(layer)) not in _QUANTISED or _is_watched(layer.base_layer)):
        return False
    return result.is_contiguous() and (weight is not None or result._base is None)


def _is_watched(base: Any) -> bool:
    """Whether someone else has a say in the base layer's output, and may hold it."""
    return _is_hooked(base) or "forward" in vars(base)


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
