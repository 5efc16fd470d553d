"""The rule ``kappa_tune``: layers with well-conditioned weights first."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from weightlora.model.distributed import process_count
from weightlora.model.gathering import loaded
from weightlora.selection.rules.base import BlindRule, Scores

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class KappaTune(BlindRule):
    """Score a site by 1 ÷ κ = σ_min ÷ σ_max of its frozen weight, the inverse condition number (KappaTune).

    No batch is read and nothing is trained, so that the score does not depend on the task. Each weight takes one
    singular value decomposition without vectors, in fp32. A weight of deficient rank scores 0 and is not kept.

    PEFT's ``KappaTuneSelector`` ranks layers by the same number. It is not used here: it returns names and no numbers,
    leaves out GPT-2's transposed layers, and would rank LoRA's own matrices as well.

    Example:
        >>> KappaTune().batches([20])
        0
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - reads no batch
        """Yield the scores, in one row."""
        scores = tuple(_inverse_condition(layer) for layer in stage.layers.values())
        yield steps[-1], Scores((scores,), (True,) * len(scores), scores)


@torch.no_grad()
def _inverse_condition(layer: LoraLayer) -> float:
    """σ_min ÷ σ_max of the base layer's weight; 0 where the weight is zero."""
    values = torch.linalg.svdvals(full_weight(layer))
    return float(values[-1] / values[0]) if values[0] > 0 else 0.0


def full_weight(layer: LoraLayer) -> Tensor:
    """Return the frozen weight of a LoRA layer as (out, in) in at least fp32: whole and dequantised.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from weightlora.model.layers import lora_layers
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
        >>> full_weight(lora_layers(model)["0"]).shape
        torch.Size([2, 3])
    """
    base: Any = layer.get_base_layer()
    own: dict[str, Tensor] = dict(base.named_parameters(recurse=False))
    with loaded(base):
        weight: Tensor = dequantize_module_weight(base).detach()
    for name, parameter in own.items():  # PEFT replaces an 8-bit weight on the CPU by one without its scales
        if getattr(base, name) is not parameter:
            setattr(base, name, parameter)
    if process_count() > 1:
        from torch.distributed.tensor import DTensor

        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    weight = weight.to(wide(weight))
    return weight.t() if isinstance(base, Conv1D) else weight


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type to sum in: fp32, or a wider one where ``tensor`` has one."""
    return torch.promote_types(tensor.dtype, torch.float32)
