"""Make a plan from a model's sites and the names of those to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from weightlora.model.sites import Site, rank_and_alpha
from weightlora.plan.lora_config import config_fields, whole_or_float
from weightlora.plan.plan import AdapterPlan, PlannedSite

if TYPE_CHECKING:
    from peft import LoraConfig


def make_plan(
    sites: Sequence[Site],
    lora: LoraConfig,
    kept: Sequence[str],
    scores: Sequence[float] | None = None,
    errors: Sequence[float] = (),
    ranks: Mapping[str, int] | None = None,
    **record: Any,
) -> AdapterPlan:
    """Build the plan that keeps ``kept`` of ``sites`` at the ranks ``lora`` gives them, or at ``ranks``.

    Args:
        sites: All candidates, sorted by name.
        lora: The user's config; its rank and alpha patterns are applied.
        kept: Names of the sites that carry an adapter.
        scores: One per site; None where sites were not scored.
        errors: Standard error of each score; empty where they have none.
        ranks: Rank of each kept site, where it is not ``lora``'s. Alpha changes with it, so that alpha/r stays; rsLoRA,
            whose scaling is alpha/√r, keeps alpha.
        record: Further fields of :class:`AdapterPlan`.
    """
    keep = set(kept)
    entries: list[PlannedSite] = []
    known = zip(sites, scores or [0.0] * len(sites), errors or [None] * len(sites), strict=True)
    for site, score, error in known:
        r, alpha = rank_and_alpha(lora, site.name)
        planned = (r if ranks is None else ranks[site.name]) if site.name in keep else 0
        own = alpha if planned in (0, r) or lora.use_rslora else whole_or_float(Fraction(alpha) * planned / r)
        entries.append(PlannedSite(site, r, alpha, r=planned, alpha=own, score=score, score_error=error))
    return AdapterPlan(tuple(entries), lora=config_fields(lora), **record)
