"""Singular triplets of a frozen layer's weight, W0 = Σ_j σ_j·u_j·v_jᵀ, as factors of an adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from weightlora.model.gathering import loaded


@torch.no_grad()
def singular_factors(layer: LoraLayer, which: slice) -> tuple[Tensor, Tensor]:
    """Return A = √Σ·Vᵀ (r, in) and B = U·√Σ (out, r) of some triplets of the base layer's weight, in fp32.

    Args:
        layer: A LoRA layer; a quantised weight is dequantised.
        which: Triplets by falling σ: ``slice(8)`` for the eight largest, ``slice(-8, None)`` for the smallest.

    Example:
        >>> from peft.tuners.lora import Linear
        >>> from peft import LoraConfig
        >>> base = torch.nn.Linear(2, 2, bias=False)
        >>> base.weight.data = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> a, b = singular_factors(Linear(base, "default", LoraConfig(), r=1), slice(1))
        >>> b @ a
        tensor([[4., 0.],
                [0., 0.]])
    """
    base: Any = layer.get_base_layer()
    with loaded(base):
        weight = dequantize_module_weight(base).detach().float()
    u, s, v = torch.linalg.svd(weight.T if isinstance(base, Conv1D) else weight, full_matrices=False)
    roots = s[which].sqrt()
    return roots.unsqueeze(1) * v[which], u[:, which] * roots
