"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454) as in PEFT: two trained vectors per site, shared random matrices.

ΔW = diag(b)·B·diag(d)·A (equation 2). A (r, in) and B (out, r) are slices of one frozen pair, and the vectors b (out)
and d (r) are trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ExpandedMethod, Start, recorded, uniform_plan
from weightlora.methods.families.export import Factors
from weightlora.model.sites import tuner_fields
from weightlora.validation import Count, Natural, Positive

if TYPE_CHECKING:
    from peft import PeftModel

    from weightlora.plan.plan import AdapterPlan


@dataclass(kw_only=True, eq=False)
class Vera(ExpandedMethod):
    """VeRA; the names of its options are those of PEFT's ``VeraConfig``.

    Args:
        r: Rank of A and B, trained and exported. None: the budget's rank. A larger one exceeds the budget and costs one
            trained number for each site and rank; PEFT has 256.
        d_initial: d at the start; b starts at 0.
        projection_prng_key: Decides A and B.
    """

    r: Count | None = None
    d_initial: Positive = 0.1
    projection_prng_key: Natural = 0

    def _planned(self, start: Start) -> AdapterPlan:
        rank = start.lora.r if self.r is None else self.r
        return uniform_plan(start, r=rank, alpha=rank, rule="vera", options=recorded(self, r=rank))  # the scale is 1

    def _put(self, start: Start) -> PeftModel:
        from peft import VeraConfig, get_peft_model

        fields = tuner_fields(start.lora, start.sites)
        config = VeraConfig(**self._plan.options, vera_dropout=start.lora.lora_dropout, **fields)
        return get_peft_model(start.model, config)  # pyright: ignore[reportArgumentType, reportReturnType]

    def _factors(self, layer: Any) -> Factors:
        """Return diag(d)·A and diag(b)·B of one of PEFT's VeRA layers."""
        d, b = layer.vera_lambda_d["default"].unsqueeze(1), layer.vera_lambda_b["default"].unsqueeze(1)
        a, whole_b = layer.vera_A["default"], layer.vera_B["default"]
        return Factors(d * a[:, : layer.in_features].to(d.device), b * whole_b[: layer.out_features].to(b.device), 1.0)


build = Vera
