"""A site's sensitivity Σ|ΔW∘∂L/∂ΔW|, an estimate of what removing ΔW costs, without a matrix of ΔW's size.

∂L/∂ΔW = gᵀ·x, with x the site's input and g the gradient of its output. Both are known in the backward pass, and the
sum is computed for a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_ENTRIES = 2**20  # entries of ∂L/∂ΔW computed at once


def watch_backward(layer: Any, call: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
    """Make each backward pass call ``call(x, g)`` with A's input and the gradient of the layer's output.

    This keeps no tensor longer: autograd holds x for A's gradient until then.
    """
    given: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        given.append(output.detach())

    def attach(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        x = given.pop()
        if output.requires_grad:
            output.register_hook(partial(call, x))

    return [layer.lora_dropout["default"].register_forward_hook(keep), layer.register_forward_hook(attach)]


@torch.no_grad()
def sensitivity(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """Return I = Σ|ΔW∘G| / √(d_out·d_in) with G = gᵀ·x, computed in blocks of rows.

    Args:
        layer: The site's adapter.
        x: A's input, (..., in).
        gradient: g of the layer's output, (..., out).
    """
    a, b, e = (matrix["default"].detach() for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    x, gradient = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
    scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
    right, size = (scale * e * a).float(), max(1, _ENTRIES // x.shape[1])
    total = torch.zeros((), device=x.device)
    for left, g in zip(b.float().split(size), gradient.split(size, dim=1), strict=True):
        total += ((left @ right) * (g.T @ x)).abs().sum()
    return total / (x.shape[1] * gradient.shape[1]) ** 0.5
