"""MELoRA (Ren et al. 2024, ACL): N mini adapters on N blocks of features: rank r with r·(in + out)/N numbers.

ΔW = s·diag(B_1, …, B_N)·diag(A_1, …, A_N), A_k (r/N, in/N), B_k (out/N, r/N). It is stock LoRA of rank r whose A and B
stay zero outside their diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.errors import OptionError
from weightlora.methods.base import ChoosingMethod, Method, PreparedPlan, plan_of
from weightlora.model.layers import lora_layers
from weightlora.model.sites import Site, find_sites, rank_and_alpha
from weightlora.validation import Count

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


def build(*, n_mini: Count = 4) -> Method:
    """Return the method.

    Args:
        n_mini: N, mini adapters of a site, each of rank r/N. 4 of rank 2 are Table 1's 110K; 1 is plain LoRA.
    """

    def choose(model: nn.Module, lora: LoraConfig, _batches: Iterable[Any], _total_steps: int) -> PreparedPlan:
        found = find_sites(model, lora)
        _require_blocks(found.sites, lora, n_mini)
        options = {"n_mini": n_mini}
        plan = plan_of(model, lora, found, rule="melora", options=options, target_parameters=None)
        return PreparedPlan(plan, partial(_split, n_mini))

    return ChoosingMethod(choose)


@torch.no_grad()
def _split(n_mini: int, attached: PeftModel) -> None:
    """Zero A outside its diagonal blocks, and mask the gradients of A and B there."""
    layers: dict[str, Any] = dict(lora_layers(attached))
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # PEFT's A is uniform within 1/√in; a mini adapter has in/N inputs.
        a.mul_(n_mini**0.5 * diagonal_blocks(a, n_mini))
        for matrix in (a, b):
            matrix.register_hook(_masked(diagonal_blocks(matrix, n_mini)))


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` diagonal blocks of a matrix of this shape, 1 inside and 0 outside.

    Example:
        >>> diagonal_blocks(torch.empty(2, 4), 2)
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """
    rows, columns = matrix.shape
    block = torch.ones(rows // count, columns // count, device=matrix.device, dtype=matrix.dtype)
    return torch.block_diag(*[block] * count)


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a hook that masks a gradient: zeros without gradient stay zeros under any optimizer and weight decay."""
    return lambda gradient: gradient * mask.to(gradient.dtype)


def _require_blocks(sites: Sequence[Site], lora: LoraConfig, n_mini: int) -> None:
    for site in sites:
        r = rank_and_alpha(lora, site.name)[0]
        for what, size in (("r", r), ("in_features", site.in_features), ("out_features", site.out_features)):
            if size % n_mini:
                raise OptionError(
                    f"n_mini={n_mini} does not divide {what}={size} of {site.name}; choose one that does, or leave the "
                    "site out of target_modules"
                )
