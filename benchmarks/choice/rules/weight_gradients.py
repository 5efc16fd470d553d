"""Gradients of the frozen weights, without letting these require gradients: ∂L/∂W = Σ over tokens of ∂L/∂y · xᵀ.

Autograd would compute no gradient for a quantised weight, and PEFT's layers keep the others frozen. With B = 0 the
adapter adds nothing, so the gradient of the LoRA layer's output y is that of the base layer's output, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weightlora.selection.rules.kappa_tune import wide
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


def _holder(layer: Any) -> Tensor:
    """A zero of shape (out, in) that takes no memory and can hold a ``grad``."""
    b: Tensor = layer.lora_B["default"].weight
    zero = torch.zeros((), dtype=wide(b), device=b.device)
    return zero.expand(layer.out_features, layer.in_features)


# -- a layer's input and the gradient of its output ------------------------------------------------------------------

Save = Callable[[str, Tensor], Tensor]
"""``save(name, x)``: what is needed of a layer's input x, (tokens, in), in the backward pass."""
Receive = Callable[[str, Tensor, Tensor], None]
"""``receive(name, saved, gradient)``: what ``save`` returned, and the gradient of the output, (tokens, out)."""


@contextmanager
def in_backward(layers: Mapping[str, LoraLayer], save: Save, receive: Receive) -> Generator[None]:
    """Call ``receive`` in the backward pass, once for each call of a layer that the loss depends on.

    The hooks are on the LoRA layers and not on their base layers, for two reasons. The fast step stays in use. And the
    output of a LoRA layer requires a gradient wherever B does; that of a frozen base layer does not, if nothing before
    it is trained. Passes without gradients are left out, and what gradient checkpointing computes again counts once.

    Args:
        layers: LoRA layers by site name; their B must require gradients.
        save: What is kept of the input until the backward pass.
        receive: Takes it, and the gradient.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from weightlora.model.layers import lora_layers
        >>> net = nn.Sequential(nn.Linear(3, 1))
        >>> layers = lora_layers(get_peft_model(net, LoraConfig(target_modules=["0"])))
        >>> with in_backward(layers, lambda name, x: x.sum(0), lambda *found: print(*found)):
        ...     net(torch.ones(2, 3)).sum().backward()
        0 tensor([2., 2., 2.]) tensor([[1.],
                [1.]])
    """
    hooked: dict[str, Any] = {**layers}
    handles = [layer.register_forward_hook(_Tap(name, save, receive)) for name, layer in hooked.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Tap:
    """A forward hook that leaves the numbers of a layer's output as they are."""

    name: str
    save: Save
    receive: Receive

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        return _Tapped.apply(output, self.save(self.name, _rows(inputs[0].detach())), self)  # pyright: ignore[reportReturnType]


class _Tapped(torch.autograd.Function):
    """The identity, whose backward pass calls ``receive``.

    It saves as autograd does: checkpointing frees what is saved, and a later change of it in place is an error. The
    output is a copy of y, because a view could not be changed in place; y itself is then freed.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, saved: Tensor, tap: _Tap) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.tap = tap
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (saved,) = ctx.saved_tensors
        ctx.tap.receive(ctx.tap.name, saved, _rows(gradient))
        return gradient, None, None


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) → (tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])
