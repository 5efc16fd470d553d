"""What a layer received and the gradient of its output, together, in each backward pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
