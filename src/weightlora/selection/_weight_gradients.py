"""Gradients of the frozen weights, without letting these require gradients: ∂L/∂W = Σ over tokens of ∂L/∂y · xᵀ.

Autograd would compute no gradient for a quantised weight, and PEFT's layers keep the others frozen. Here a forward hook
on each LoRA layer saves the layer's input x. In the backward pass, the gradient of the layer's output y gives ∂L/∂W.
With B = 0 the adapter adds nothing, so ∂L/∂y is the gradient of the base layer's output, too.

The hook is on the LoRA layer and not on its base layer for two reasons. The fast step stays in use. And the layer's
output requires a gradient wherever B does; a frozen base layer's output does not, if nothing before it is trained.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from weightlora.model.distributed import process_count


@contextmanager
def weight_gradients(layers: Mapping[str, LoraLayer]) -> Generator[list[Tensor]]:
    """Accumulate the gradient of each layer's full weight within the block.

    Several backward passes, and several calls of one layer in a pass, add up. Calls that need no gradient, such as
    those of a reference model, add nothing. B must require gradients and be zero.

    Args:
        layers: LoRA layers by site name, as :func:`weightlora.model.layers.lora_layers` returns them.

    Yields:
        One tensor of shape (out, in) for each layer, in their order. Its ``grad`` is ∂L/∂W in at least fp32, or None
        where the loss does not depend on the layer; set it to None to start again. The tensor itself takes no memory.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from weightlora.model.layers import lora_layers
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]))
        >>> with weight_gradients(lora_layers(model)) as (weight,):
        ...     model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
        >>> weight.grad
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """
    hooked: list[Any] = list(layers.values())
    taps = [_Tap(_holder(layer)) for layer in hooked]
    handles = [layer.register_forward_hook(tap) for layer, tap in zip(hooked, taps, strict=True)]
    try:
        yield [tap.holder for tap in taps]
    finally:
        for handle in handles:
            handle.remove()


def full_weight(layer: LoraLayer) -> Tensor:
    """Return the frozen weight of a LoRA layer as (out, in) in at least fp32: dequantised, and whole if it is sharded.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from weightlora.model.layers import lora_layers
        >>> model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
        >>> full_weight(lora_layers(model)["0"]).shape
        torch.Size([2, 3])
    """
    base: Any = layer.get_base_layer()
    weight: Tensor = dequantize_module_weight(base).detach()
    if process_count() > 1:
        from torch.distributed.tensor import DTensor

        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    weight = weight.to(wide(weight))
    return weight.t() if isinstance(base, Conv1D) else weight


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type to sum in: fp32, or a wider one where ``tensor`` has one."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class _Tap:
    """A forward hook that leaves a layer's output as it is and accumulates the weight's gradient."""

    holder: Tensor

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        return _Tapped.apply(output, inputs[0], self)  # pyright: ignore[reportReturnType]

    def add(self, gradient: Tensor) -> None:
        """Accumulate a gradient of shape (out, in)."""
        if self.holder.grad is None:
            self.holder.grad = gradient.to(self.holder.dtype)
        else:
            self.holder.grad += gradient


class _Tapped(torch.autograd.Function):
    """The identity, whose backward pass also computes ∂L/∂W.

    It saves x as autograd does, so checkpointing frees x, and a later change of x in place is an error. Its output is
    a copy of y, because a view could not be changed in place; y itself is then freed.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tap: _Tap) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap = tap
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (x,) = ctx.saved_tensors
        dy = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
        rows = x.reshape(-1, x.shape[-1]).to(device=dy.device, dtype=dy.dtype)  # (tokens, in)
        ctx.tap.add(dy.t() @ rows)
        return gradient, None, None


def _holder(layer: Any) -> Tensor:
    """A zero of shape (out, in) that takes no memory and can hold a ``grad``."""
    b: Tensor = layer.lora_B["default"].weight
    zero = torch.zeros((), dtype=wide(b), device=b.device)
    return zero.expand(layer.out_features, layer.in_features)
