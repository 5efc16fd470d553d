"""One trainable number ω per adapter, kept outside the model: W = W0 + ω·s·B·A (paper, eq. 1).

A gate is a forward hook on ``lora_A`` that multiplies its output of r numbers a token: ΔW is never built, nothing of
size d_out is saved for the backward pass, and quantised base layers work unchanged. No parameter is registered: no
optimizer, weight decay, gradient clipping or cast can reach ω.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Return the layers of ``model`` that carry ``adapter``, by their name in the base model, sorted.

    Args:
        model: A PEFT model, or any module that PEFT has put LoRA layers into.
        adapter: The adapter's name.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}
    return dict(sorted(found.items()))


@dataclass
class Gate:
    """One site's ω while it is attached."""

    omega: Tensor
    """An fp32 leaf of shape ()."""
    closed: bool = False
    """Whether ω is 0, known without asking the device."""

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook: the output of ``lora_A``, times ω."""
        return _Multiply.apply(output, self.omega.to(output.device), self.closed)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Gates:
    """The gates of a model while they are attached; a vector in the order of ``names``.

    Each gate is a tensor of its own: with one vector, every hook's gradient would be a vector of length n, and the
    cost of a step would grow with n².
    """

    names: tuple[str, ...]
    gates: tuple[Gate, ...]

    @property
    def scalars(self) -> list[Tensor]:
        """The leaves, one a site."""
        return [gate.omega for gate in self.gates]

    @property
    def omega(self) -> Tensor:
        """A copy of the gates as one fp32 vector of shape (n,)."""
        return torch.stack([scalar.detach() for scalar in self.scalars])

    @property
    def gradient(self) -> Tensor:
        """∂L/∂ω as one fp32 vector of shape (n,), summed over the backward passes since :meth:`clear_gradient`."""
        zero = torch.zeros_like(self.scalars[0])
        return torch.stack([zero if scalar.grad is None else scalar.grad for scalar in self.scalars])

    def clear_gradient(self) -> None:
        """Forget the gradient, as an optimizer's ``zero_grad`` does."""
        for scalar in self.scalars:
            scalar.grad = None

    def write(self, omega: Tensor) -> None:
        """Set the gates to the vector ``omega`` of shape (n,)."""
        with torch.no_grad():
            for gate, value, closed in zip(self.gates, omega.unbind(), (omega == 0).tolist(), strict=True):
                gate.omega.copy_(value)
                gate.closed = closed


@contextmanager
def gated(layers: Mapping[str, LoraLayer], adapter: str = "default") -> Generator[Gates]:
    """Attach a gate of value 1 to each layer for the length of the block.

    Args:
        layers: LoRA layers by site name, as :func:`lora_layers` returns them.
        adapter: The adapter whose output is gated.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> with gated(lora_layers(model)) as gates:
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> gates.names, gates.gradient.shape
        (('0',), torch.Size([1]))
    """
    device = next((p.device for layer in layers.values() for p in layer.lora_A[adapter].parameters()), None)
    ones = (torch.ones((), dtype=torch.float32, device=device, requires_grad=True) for _ in layers)
    gates = Gates(names=tuple(layers), gates=tuple(map(Gate, ones)))
    handles = [
        layer.lora_A[adapter].register_forward_hook(gate)
        for layer, gate in zip(layers.values(), gates.gates, strict=True)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


class _Multiply(torch.autograd.Function):
    """y = ω·x that saves y, which ``lora_B`` saves anyway, and not x: an open gate costs no memory.

    With ω ≠ 0, ∂L/∂ω = ⟨∂L/∂y, x⟩ = ⟨∂L/∂y, y⟩/ω. A closed gate saves x, so that it can open again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, omega: Tensor, closed: bool) -> Tensor:
        y = x * omega  # a tensor of shape () does not promote: y keeps the activation's dtype
        ctx.closed = closed
        ctx.save_for_backward(x if closed else y, omega)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        saved, omega = ctx.saved_tensors
        wide = torch.promote_types(saved.dtype, torch.float32)  # a product of two halves would round or underflow
        product = (gradient.to(wide) * saved.to(wide)).sum()
        return gradient * omega, product if ctx.closed else product / omega, None
