"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454) as in PEFT: two trained vectors per site, shared random matrices.

ΔW = diag(b)·B·diag(d)·A (equation 2). A (r, in) and B (out, r) are slices of one frozen pair, and the vectors b (out)
and d (r) are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ExpandedMethod, Method, uniform_plan
from weightlora.methods.common.export import Factors
from weightlora.model.sites import find_sites, tuner_fields

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

    from weightlora.plan.plan import AdapterPlan


def build(*, r: int | None = None, d_initial: float = 0.1, projection_prng_key: int = 0) -> Method:
    """Return the method; the names are those of PEFT's ``VeraConfig``.

    Args:
        r: Rank of A and B, trained and exported. None: the budget's rank. A larger one exceeds the budget and costs one
            trained number for each site and rank; PEFT has 256.
        d_initial: d at the start; b starts at 0.
        projection_prng_key: Decides A and B.
    """
    given = {"r": r, "d_initial": d_initial, "projection_prng_key": projection_prng_key}
    return ExpandedMethod(partial(_attach, given), expanded)


def _attach(given: Mapping[str, Any], model: nn.Module, lora: LoraConfig) -> tuple[AdapterPlan, PeftModel]:
    from peft import VeraConfig, get_peft_model

    sites = find_sites(model, lora).sites
    rank = lora.r if given["r"] is None else given["r"]
    own = {**given, "r": rank}
    plan = uniform_plan(model, lora, sites, r=rank, alpha=rank, rule="vera", options=own)  # the scale is 1
    config = VeraConfig(**own, vera_dropout=lora.lora_dropout, **tuner_fields(lora, sites))
    return plan, get_peft_model(model, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def expanded(layer: Any) -> Factors:
    """Return diag(d)·A and diag(b)·B of one of PEFT's VeRA layers."""
    d, b = layer.vera_lambda_d["default"].unsqueeze(1), layer.vera_lambda_b["default"].unsqueeze(1)
    a, whole_b = layer.vera_A["default"], layer.vera_B["default"]
    return Factors(d * a[:, : layer.in_features].to(d.device), b * whole_b[: layer.out_features].to(b.device), 1.0)
