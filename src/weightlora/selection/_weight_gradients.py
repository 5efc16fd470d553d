"""Gradients of the frozen weights, without letting these require gradients: ∂L/∂W = Σ over tokens of ∂L/∂y · xᵀ.

Autograd would compute no gradient for a quantised weight, and PEFT's layers keep the others frozen. With B = 0 the
adapter adds nothing, so the gradient of the LoRA layer's output y is that of the base layer's output, too.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from weightlora.model.distributed import process_count
from weightlora.model.gathering import loaded
from weightlora.selection._backward import in_backward
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.selection.stage import Stage


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
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]))
        >>> with weight_gradients(lora_layers(model)) as (weight,):
        ...     model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
        >>> weight.grad
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """
    holders = {name: _holder(layer) for name, layer in layers.items()}

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        holder = holders[name]
        found = gradient.t() @ x.to(device=gradient.device, dtype=gradient.dtype)
        if holder.grad is None:
            holder.grad = found.to(holder.dtype)
        else:
            holder.grad += found

    with in_backward(layers, lambda _, x: x, add):
        yield list(holders.values())


def gradient_norms(stage: Stage, steps: Sequence[int]) -> Generator[tuple[int, Tensor]]:
    """Yield T and ‖∂L/∂W‖_F of the first T batches, for each T of ``steps`` in ascending order.

    Only B requires gradients, so that the backward pass reaches every site.

    Yields:
        T, and the norms in fp64: one row for each batch, one column for each site, 0 where there was no gradient.
    """
    matrices = stage.parameters("lora_B")
    let_train(stage, matrices)
    seen: list[Tensor] = []
    with weight_gradients(stage.layers) as weights:
        for step in range(1, steps[-1] + 1):
            stage.backward("scoring", step, [*matrices, *weights])
            norms = [torch.zeros(()) if w.grad is None else w.grad.norm().cpu() for w in weights]
            seen.append(torch.stack([norm.double() for norm in norms]))
            for tensor in (*matrices, *weights):
                tensor.grad = None
            if step in steps:
                yield step, torch.stack(seen)


def full_weight(layer: LoraLayer) -> Tensor:
    """Return the frozen weight of a LoRA layer as (out, in) in at least fp32: whole and dequantised.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from weightlora.model.layers import lora_layers
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
        >>> full_weight(lora_layers(model)["0"]).shape
        torch.Size([2, 3])
    """
    base: Any = layer.get_base_layer()
    own: dict[str, Tensor] = dict(base.named_parameters(recurse=False))
    with loaded(base):
        weight: Tensor = dequantize_module_weight(base).detach()
    for name, parameter in own.items():  # PEFT replaces an 8-bit weight on the CPU by one without its scales
        if getattr(base, name) is not parameter:
            setattr(base, name, parameter)
    if process_count() > 1:
        from torch.distributed.tensor import DTensor

        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    weight = weight.to(wide(weight))
    return weight.t() if isinstance(base, Conv1D) else weight


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type to sum in: fp32, or a wider one where ``tensor`` has one."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _holder(layer: Any) -> Tensor:
    """A zero of shape (out, in) that takes no memory and can hold a ``grad``."""
    b: Tensor = layer.lora_B["default"].weight
    zero = torch.zeros((), dtype=wide(b), device=b.device)
    return zero.expand(layer.out_features, layer.in_features)
