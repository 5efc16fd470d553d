"""Make a plan from a model's sites and the names of those to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlora.model.sites import Site, rank_and_alpha
from weightlora.plan.lora_config import config_fields
from weightlora.plan.plan import AdapterPlan, PlannedSite

if TYPE_CHECKING:
    from peft import LoraConfig


def make_plan(
    sites: Sequence[Site], lora: LoraConfig, kept: Sequence[str], scores: Sequence[float] | None = None, **record: Any
) -> AdapterPlan:
    """Build the plan that keeps ``kept`` of ``sites`` at the ranks ``lora`` gives them.

    Args:
        sites: All candidates, sorted by name.
        lora: The user's config; its rank and alpha patterns are applied.
        kept: Names of the sites that carry an adapter.
        scores: One per site; None where sites were not scored.
        record: Further fields of :class:`AdapterPlan`.
    """
    keep = set(kept)
    entries: list[PlannedSite] = []
    for site, score in zip(sites, scores or [0.0] * len(sites), strict=True):
        r, alpha = rank_and_alpha(lora, site.name)
        entries.append(PlannedSite(site, r, alpha, r=r if site.name in keep else 0, alpha=alpha, score=score))
    return AdapterPlan(tuple(entries), lora=config_fields(lora), **record)
