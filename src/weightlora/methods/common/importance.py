"""A site's sensitivity Σ|ΔW∘∂L/∂ΔW|, an estimate of what removing ΔW costs, without a matrix of ΔW's size.

∂L/∂ΔW = gᵀ·x, with x the site's input and g the gradient of its output. Both are known in the backward pass, and the
sum is computed for a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.model.distributed import average, process_count, require_agreement

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_ENTRIES = 2**20  # entries of ∂L/∂ΔW computed at once


class Sensitivities:
    """Each site's sensitivity, added up over backward passes until it is taken.

    Several processes average ∂L/∂ΔW within a backward pass, so each site must be in it on all of them.

    Args:
        layers: The sites' adapters by name; watched until :meth:`stop`.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._expected = dict.fromkeys(layers, 0)
        self._compared = False
        self._handles = [
            handle
            for name, layer in layers.items()
            for handle in watch_backward(layer, partial(self._add, name), partial(self._expect, name))
        ]

    def take(self) -> Tensor:
        """Return the sums (sites,) and start anew; sites without a backward pass have 0."""
        found = torch.stack([self._sums.get(name, torch.zeros(())).cpu() for name in self._layers])
        self._sums, self._expected, self._compared = {}, dict.fromkeys(self._layers, 0), False
        return found

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _expect(self, name: str) -> None:
        self._expected[name] += 1

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if process_count() > 1 and not self._compared:  # else a process would wait for what no other sends
            advice = "train in one process a model that leaves out layers or experts at some rows"
            require_agreement(str(self._expected), "the set of sites that a batch runs through", advice)
        self._expected[name] -= 1
        self._compared = any(self._expected.values())
        self._sums[name] = self._sums.get(name, 0) + sensitivity(self._layers[name], x, gradient)


def watch_backward(
    layer: Any, call: Callable[[Tensor, Tensor], None], announce: Callable[[], None] | None = None
) -> list[RemovableHandle]:
    """Make each backward pass call ``call(x, g)`` with A's input and the gradient of the layer's output.

    This keeps no tensor longer: autograd holds x for A's gradient until then.

    Args:
        layer: The site's adapter.
        call: What is called.
        announce: Called in each forward pass that may be followed by a backward pass.
    """
    given: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        given.append(output.detach())

    def attach(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        x = given.pop()
        if output.requires_grad:
            output.register_hook(partial(call, x))
            if announce is not None:
                announce()

    return [layer.lora_dropout["default"].register_forward_hook(keep), layer.register_forward_hook(attach)]


@torch.no_grad()
def sensitivity(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """Return I = Σ|ΔW∘G| / √(d_out·d_in) with G = gᵀ·x, the mean over the processes, computed in blocks of rows.

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
        total += ((left @ right) * average(g.T @ x)).abs().sum()
    return total / (x.shape[1] * gradient.shape[1]) ** 0.5
