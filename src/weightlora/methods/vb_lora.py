"""VB-LoRA (Li et al. 2024, arXiv:2405.15179) as in PEFT: A and B are composed of vectors of one shared bank.

ΔW = B·A. Rows of A and columns of B are cut into pieces of length b. A piece is Σ_k softmax(topK(σ))_k·v_k: K of the h
vectors v of the bank, weighted by the K largest of the piece's own h logits σ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.methods.base import ExpandedMethod, Start, recorded, uniform_plan
from weightlora.methods.families.export import Factors
from weightlora.model.sites import Site, tuner_fields
from weightlora.validation import Count, Positive

if TYPE_CHECKING:
    from peft import PeftModel

    from weightlora.plan.plan import AdapterPlan

_LONGEST = 256


@dataclass(kw_only=True, eq=False)
class VbLora(ExpandedMethod):
    """VB-LoRA; the names of its options are those of PEFT's ``VBLoRAConfig``.

    Args:
        r: Rank, trained and exported. None: the budget's rank; a larger one exceeds the budget.
        num_vectors: h, vectors in the bank.
        vector_length: b, a divisor of both sizes of every site. None: the largest up to 256, PEFT's default.
        topk: K, vectors mixed into a piece.
        init_vector_bank_bound: The bank starts uniform within ± this.
        init_logits_std: The logits start normal with this deviation.

    Raises:
        OptionError: K is larger than h.
    """

    r: Count | None = None
    num_vectors: Count = 256
    vector_length: Count | None = None
    topk: Count = 2
    init_vector_bank_bound: Positive = 0.02
    init_logits_std: Positive = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= self.num_vectors:
            raise OptionError(f"topk={self.topk} is not allowed: give 1 to num_vectors={self.num_vectors}")

    def _planned(self, start: Start) -> AdapterPlan:
        rank = start.lora.r if self.r is None else self.r
        options = recorded(self, r=rank, vector_length=piece_length(start.sites, self.vector_length))
        return uniform_plan(start, r=rank, alpha=rank, rule="vb_lora", options=options)  # the scale is 1

    def _put(self, start: Start) -> PeftModel:
        from peft import VBLoRAConfig, get_peft_model

        fields = tuner_fields(start.lora, start.sites)
        config = VBLoRAConfig(**self._plan.options, vblora_dropout=start.lora.lora_dropout, **fields)
        return get_peft_model(start.model, config)  # pyright: ignore[reportArgumentType, reportReturnType]

    def _factors(self, layer: Any) -> Factors:
        """Return A and B of one of PEFT's VB-LoRA layers, as its forward pass computes them."""
        a, b = layer._get_lora_matrices("default")
        return Factors(a, b, 1.0)


build = VbLora


def piece_length(sites: Sequence[Site], asked: int | None) -> int:
    """Return ``asked``, or the largest length up to 256 that divides all sizes.

    Raises:
        OptionError: ``asked`` does not divide them, or only 1 does.

    Example:
        >>> piece_length([Site("a", 768, 3072), Site("b", 3072, 640)], None)
        128
    """
    sizes = sorted({size for site in sites for size in (site.in_features, site.out_features)})
    common = math.gcd(*sizes)
    largest = max(length for length in range(1, min(common, _LONGEST) + 1) if common % length == 0)
    if asked is None and largest > 1:
        return largest
    if asked is not None and asked >= 1 and common % asked == 0:
        return asked
    found = "no vector_length above 1 divides" if asked is None else f"vector_length={asked} does not divide"
    raise OptionError(
        f"{found} all sizes {', '.join(map(str, sizes))} of the sites; give a divisor of {common}, or leave sites "
        "out of target_modules"
    )
