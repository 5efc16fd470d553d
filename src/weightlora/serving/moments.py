"""The update of a site as a sum of directions, weighted by second moments of its inputs, and how many each site keeps.

ΔW = s·B·A has at most r singular triplets σ·u·vᵀ. Each costs in + out parameters and holds σ² of the squared norm. With
moments of the inputs, G = E[(A·x)(A·x)ᵀ], a direction holds its part of E‖ΔW·x‖², the error that the next layer sees:
the directions are those of s·B·√G, and what is kept is ΔW projected on the best u.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.errors import PlanError, SelectionError
from weightlora.model.gathering import device_of
from weightlora.model.layers import lora_layers
from weightlora.model.restore import evaluated
from weightlora.selection.batches import counted_tokens, to_device

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def adapter_moments(model: PeftModel, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return E[(A·x)(A·x)ᵀ] of the inputs x of each site, (r, r) in float64, by the site's name.

    Only A's outputs are read, so that this costs forward passes and r² numbers a site. Padding does not count. The
    model is as before afterwards.

    Args:
        model: The base model with the adapter, ``PeftModel.from_pretrained(base, folder)``.
        batches: Dicts that the model is called with, such as the batches of the training.

    Raises:
        SelectionError: There is no batch.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["layer"]))
        >>> a = model.base_model.model.layer.lora_A["default"].weight
        >>> _ = torch.nn.init.ones_(a)
        >>> adapter_moments(model, [{"x": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}])
        {'layer': tensor([[5.]], dtype=torch.float64)}
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(lora_layers(model), 0)
    handles: list[Any] = []
    with evaluated(model), counted_tokens(model) as rows:

        def add(name: str, _module: Any, _inputs: Any, output: Tensor) -> None:
            seen = rows(output).double()
            sums[name] = sums.get(name, 0.0) + seen.T @ seen
            counts[name] += len(seen)

        layers: dict[str, Any] = dict(lora_layers(model))
        try:
            for name, layer in layers.items():
                handles.append(layer.lora_A["default"].register_forward_hook(partial(add, name)))
            for batch in batches:
                model(**to_device(batch, device_of(model)))
        finally:
            for handle in handles:
                handle.remove()
    if not sums:
        raise SelectionError("batches is empty; give at least one batch")
    return {name: (total / max(counts[name], 1)).cpu() for name, total in sums.items()}


# -- directions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Directions:
    """The update of a site as a sum of directions, the largest first."""

    gains: tuple[float, ...]
    """What each holds of the squared norm."""
    left: Tensor  # (r, d): B·left has orthonormal columns
    right: Tensor  # (d, r): right·A are the rows that go with them

    def cut(self, a: Tensor, b: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A (k, in) and B (out, k) of the first k directions, of equal norms, for a site of PEFT's ``scale``."""
        rows = self.right[:k] @ a.double()
        root = (rows.norm(dim=1) / scale).sqrt()
        return rows / (scale * root).unsqueeze(1), (b.double() @ self.left[:, :k]) * root


def find_directions(a: Tensor, b: Tensor, scale: float, moment: Tensor | None = None) -> Directions:
    """Return the directions of scale·B·A, computed in float64 without the product itself.

    Args:
        a: A, (r, in).
        b: B, (out, r).
        scale: What PEFT multiplies B·A by.
        moment: E[(A·x)(A·x)ᵀ] over inputs x, (r, r); None is A·Aᵀ, of inputs that are all alike.

    Example:
        >>> find_directions(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2), 2.0).gains
        (36.0, 4.0)
    """
    outer = torch.linalg.qr(b.double(), mode="r").R  # (≤ r, r)
    inner = torch.linalg.qr(a.double().T, mode="r").R.T if moment is None else _root(moment)  # (r, ≤ r)
    core = scale * outer @ inner
    if not bool(core.isfinite().all()):
        raise PlanError("its numbers are not finite")
    u, sigma, v = torch.linalg.svd(core, full_matrices=False)
    real = sigma > sigma[0] * max(a.shape[1], b.shape[0]) * torch.finfo(torch.float64).eps
    left = scale * inner @ v.T / torch.where(real, sigma, 1.0)
    return Directions(tuple(torch.where(real, sigma, 0.0).square().tolist()), left, u.T @ (scale * outer))


def kept_ranks(gains: Sequence[Sequence[float]], prices: Sequence[int], most: int | None, spare: float) -> list[int]:
    """Return how many directions each site keeps: by falling gain for their price, until ``spare`` is lost.

    What no longer fits is skipped, and what gains nothing is not kept.

    Args:
        gains: What the directions of each site hold, falling.
        prices: Of one direction of each site.
        most: What all of them may cost together; None is no limit.
        spare: How much of the sum of all gains may be lost.

    Example:
        >>> kept_ranks([[8.0, 1.0], [6.0, 3.0]], [2, 1], most=4, spare=0.0)
        [1, 2]
        >>> kept_ranks([[8.0, 1.0], [6.0, 3.0]], [2, 1], most=None, spare=4.0)
        [1, 1]
    """
    order = sorted((-gain / prices[site], site, gain) for site, own in enumerate(gains) for gain in own if gain > 0)
    left, ranks = math.inf if most is None else most, [0] * len(gains)
    lost = math.fsum(gain for _, _, gain in order)
    for _, site, gain in order:
        if lost <= spare:
            break
        if prices[site] <= left:
            ranks[site] += 1
            left -= prices[site]
            lost -= gain
    return ranks


def _root(moment: Tensor) -> Tensor:
    """√G, (r, r), with √G·√Gᵀ = G."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp(min=0).sqrt()
