"""Make a plan from a model's sites and the names of those to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.model.parameters import TargetParameter
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
    target_parameters: Sequence[TargetParameter] | None = None,
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
        target_parameters: What ``lora`` adapts besides layers, as :func:`weightlora.find_sites` found it; None is the
            answer of a method that trains layers only.
        record: Further fields of :class:`AdapterPlan`.

    Raises:
        OptionError: ``lora`` has ``target_parameters``, and the method that makes the plan trains layers only.
    """
    if lora.target_parameters and target_parameters is None:
        asked, rule = sorted(lora.target_parameters)[:2], record.get("rule", "this method")
        raise OptionError(
            f"target_parameters={asked}: {rule} adapts layers only; leave the parameters out, or take the method "
            "weightlora, random or lora"
        )
    keep = set(kept)
    entries: list[PlannedSite] = []
    known = zip(sites, scores or [0.0] * len(sites), errors or [None] * len(sites), strict=True)
    for site, score, error in known:
        r, alpha = rank_and_alpha(lora, site.name)
        planned = (r if ranks is None else ranks[site.name]) if site.name in keep else 0
        own = alpha if planned in (0, r) or lora.use_rslora else whole_or_float(Fraction(alpha) * planned / r)
        entries.append(PlannedSite(site, r, alpha, r=planned, alpha=own, score=score, score_error=error))
    besides = tuple(target_parameters or ())
    return AdapterPlan(tuple(entries), lora=config_fields(lora), target_parameters=besides, **record)
