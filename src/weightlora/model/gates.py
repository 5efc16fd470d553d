"""One trainable number ω per adapter, kept outside the model: W = W0 + ω·s·B·A (paper, eq. 1).

A gate is a forward hook on ``lora_A`` that multiplies its output, r numbers per token. ΔW is never built, nothing of
size d_out is saved for the backward pass, and quantised base layers work unchanged. No parameter is registered: no
optimizer, weight decay, gradient clipping or cast can reach ω.

The loss depends on ω and B only through ω·B. So an open gate (ω ≠ 0) has the gradient ⟨B, ∂L/∂B⟩/ω, which needs two
small tensors after the backward pass. At a closed gate (ω = 0) that is 0/0; its gradient is computed during the pass.
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


@dataclass
class Gate:
    """The gate of one site while it is attached."""

    matrix: nn.Parameter
    """The weight of ``lora_B``, which multiplies the gate's output."""
    leaf: Tensor
    """An fp32 leaf tensor of shape (); its ``grad`` accumulates ∂L/∂ω while the gate is closed."""
    omega: float = 1.0

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output of ``lora_A`` times ω, in the same dtype."""
        if self.omega != 0:
            return output * self.omega
        return _Closed.apply(output, self.leaf)  # pyright: ignore[reportReturnType]

    @property
    def gradient(self) -> Tensor:
        """∂L/∂ω as an fp32 tensor of shape ()."""
        if self.omega == 0:
            return torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
        if self.matrix.grad is None:
            return torch.zeros_like(self.leaf)
        wide = torch.promote_types(
            self.matrix.dtype, torch.float32
        )  # a product in half precision would round or underflow
        b, gradient = self.matrix.detach().to(wide), self.matrix.grad.to(wide)
        return (torch.dot(b.flatten(), gradient.flatten()) / self.omega).float()


@dataclass(frozen=True)
class Gates:
    """The gates of a model while they are attached, in the order of ``names``."""

    names: tuple[str, ...]
    gates: tuple[Gate, ...]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaf tensor of each gate."""
        return [gate.leaf for gate in self.gates]

    @property
    def omega(self) -> Tensor:
        """The gates as one fp32 vector of shape (n,) on the CPU."""
        return torch.tensor([gate.omega for gate in self.gates])

    @property
    def gradient(self) -> Tensor:
        """∂L/∂ω as one fp32 vector of shape (n,) on the CPU, summed over the backward passes.

        It is computed from B and its ``grad``: read it before the optimizer changes B. To start the next sum, zero B's
        gradients and call :meth:`clear`.
        """
        return torch.stack([gate.gradient for gate in self.gates]).cpu()

    def clear(self) -> None:
        """Delete the gradients of closed gates."""
        for gate in self.gates:
            gate.leaf.grad = None

    def write(self, omega: Tensor) -> None:
        """Set the gates to the vector ``omega`` of shape (n,)."""
        for gate, value in zip(self.gates, omega.float().tolist(), strict=True):
            gate.omega = value


@contextmanager
def gated(layers: Mapping[str, LoraLayer], adapter: str = "default") -> Generator[Gates]:
    """Attach a gate with ω = 1 to each layer within the block.

    Args:
        layers: LoRA layers by site name, as :func:`weightlora.model.layers.lora_layers` returns them.
        adapter: The adapter whose output is gated.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from weightlora.model.layers import lora_layers
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> with gated(lora_layers(model)) as gates:
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> gates.names, gates.gradient.shape
        (('0',), torch.Size([1]))
    """
    matrices: list[Any] = [layer.lora_B[adapter].weight for layer in layers.values()]
    leaves = (torch.ones((), dtype=torch.float32, device=matrix.device, requires_grad=True) for matrix in matrices)
    gates = Gates(names=tuple(layers), gates=tuple(map(Gate, matrices, leaves)))
    handles = [
        layer.lora_A[adapter].register_forward_hook(gate)
        for layer, gate in zip(layers.values(), gates.gates, strict=True)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


class _Closed(torch.autograd.Function):
    """y = 0·x with the gradient ∂L/∂ω = ⟨∂L/∂y, x⟩, so that the gate can open again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _leaf: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        (x,) = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)  # a product in half precision would round or underflow
        return torch.zeros_like(x), torch.dot(gradient.to(wide).flatten(), x.to(wide).flatten()).float()
