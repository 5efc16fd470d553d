"""One trainable number ω per adapter, kept outside the model: W = W0 + ω·s·B·A (paper, eq. 1).

A gate is a forward hook on ``lora_A`` that multiplies its output of r numbers a token. Autograd therefore saves r
numbers a token for it and not d_out, ΔW is never built, and quantised base layers work unchanged. No parameter is
registered: no optimizer, weight decay, gradient clipping or cast can reach ω.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


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


@dataclass(frozen=True)
class Gates:
    """The gates of a model while they are attached; a vector in the order of ``names``.

    Each gate is a tensor of its own: with one vector, every hook's gradient would be a vector of length n, and the
    cost of a step would grow with n².
    """

    names: tuple[str, ...]
    scalars: tuple[Tensor, ...]
    """fp32 leaves of shape (), one a site."""

    @property
    def omega(self) -> Tensor:
        """A copy of the gates as one fp32 vector of shape (n,)."""
        return torch.stack([scalar.detach() for scalar in self.scalars])

    @property
    def gradient(self) -> Tensor:
        """∂L/∂ω as one fp32 vector of shape (n,), summed over the backward passes since :meth:`clear_gradient`."""
        zero = torch.zeros((), device=self.scalars[0].device)
        return torch.stack([zero if scalar.grad is None else scalar.grad for scalar in self.scalars])

    def clear_gradient(self) -> None:
        """Forget the gradient, as an optimizer's ``zero_grad`` does."""
        for scalar in self.scalars:
            scalar.grad = None

    def write(self, omega: Tensor) -> None:
        """Set the gates to the vector ``omega`` of shape (n,)."""
        with torch.no_grad():
            for scalar, value in zip(self.scalars, omega.unbind(), strict=True):
                scalar.copy_(value)


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
    gates = Gates(
        names=tuple(layers),
        scalars=tuple(torch.ones((), dtype=torch.float32, device=device, requires_grad=True) for _ in layers),
    )
    handles = [
        layer.lora_A[adapter].register_forward_hook(_multiply_by(scalar))
        for layer, scalar in zip(layers.values(), gates.scalars, strict=True)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _multiply_by(scalar: Tensor) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # A tensor of shape () does not promote: the product keeps the activation's dtype.
        return output * scalar.to(output.device)

    return hook
