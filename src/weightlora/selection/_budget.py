"""The budget that ``keep`` asks for, measured where it is a limit on memory or step time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peft import LoraConfig
from torch import nn

from weightlora.cost.knapsack import CostBudget
from weightlora.cost.saved_bytes import Losses, parameter_cost, saved_cost
from weightlora.cost.step_time import time_cost
from weightlora.errors import OptionError
from weightlora.model.distributed import from_first
from weightlora.model.gathering import is_offloaded, is_partitioned
from weightlora.model.sites import Site, adapter_parameters, output_vectors
from weightlora.plan.budget import Budget, Chooser, GainShare, Keep, Limit, read_budget, read_limit, read_share
from weightlora.plan.ranking import Ranking, ranked


def asked_budget(
    keep: Keep, ranking: Ranking, sites: Sequence[Site], lora: LoraConfig, *, besides: int = 0
) -> Chooser | Limit:
    """Return the budget; a limit on memory or step time has to be measured first.

    Args:
        keep: As in :func:`weightlora.select`.
        ranking: How sites compete.
        sites: All candidates.
        lora: The adapters wanted.
        besides: Parameters of adapters that are not chosen: a number of parameters is for all adapters together.

    Raises:
        OptionError: ``keep`` is out of its range, or cannot be measured with adapters that are not chosen.
    """
    share, parameters = read_share(keep), adapter_parameters(sites, lora)
    if besides and read_limit(keep) is not None:
        raise OptionError(
            f"keep={keep!r} cannot be measured with target_parameters, whose adapters the warm-up leaves out; give a "
            "fraction or a number of parameters"
        )
    if share is not None:
        budget = GainShare(tuple(parameters.values()), share)
    else:
        fixed = [site.out_features * output_vectors(lora) for site in sites]
        budget = read_limit(keep) or _beside(besides, keep, read_budget(keep, parameters, fixed))
    return ranked(budget, ranking, sites)


def _beside(besides: int, keep: Keep, budget: Budget) -> Budget:
    """What a number of parameters leaves for the sites."""
    if not besides or not isinstance(keep, str):
        return budget
    left = budget.limit - besides
    if left < min(budget.costs):
        raise OptionError(
            f"keep={keep!r} leaves no site beside {besides:,} parameters of target_parameters; raise keep or lower r"
        )
    return replace(budget, limit=left)


def require_measurable(limit: Limit, model: nn.Module, lora: LoraConfig) -> None:
    """Raise where a step of ``model`` does not take the memory and time that a training takes.

    Raises:
        OptionError: Its weights are loaded for each module, or the training is DoRA, which needs other memory.
    """
    if limit.unit == "bytes" and lora.use_dora:
        raise OptionError(
            f"keep={limit.text!r} is measured with plain LoRA, and use_dora=True saves about twice as much for the "
            "backward pass; leave use_dora out, or give a fraction, a number of adapters or '300k parameters'"
        )
    if is_offloaded(model) or is_partitioned(model):
        raise OptionError(
            f"keep={limit.text!r} is measured on a step, and this model's weights are loaded from elsewhere in each; "
            "give a fraction, a number of adapters or '300k parameters'"
        )


def measured_budget(
    limit: Limit, attached: nn.Module, losses: Losses, sites: Sequence[Site], lora: LoraConfig
) -> CostBudget:
    """Return the budget of ``limit``, measured on a step of plain LoRA; all processes use the first one's numbers.

    Bytes also count the biases that ``lora`` adds to plain LoRA's parameters.
    """
    in_bytes = limit.unit == "bytes"
    if in_bytes:
        own = saved_cost(attached, losses) + parameter_cost(attached, vectors=output_vectors(lora))
    else:
        own = time_cost(attached, losses)
    cost = from_first(lambda: own)
    if in_bytes:
        budget = CostBudget(cost, int(limit.amount))
    else:
        budget = CostBudget(cost, int(limit.amount * cost.of_all), unit=cost.of_all)
    least = budget.price([cost.cheapest])
    if cost.of([cost.cheapest]) > budget.limit:
        needed = f"{least / 1e6:.3f} MB" if in_bytes else f"{least:.3f}x"
        knobs = ", or lower r or the size of the batch" if in_bytes else ""
        raise OptionError(
            f"keep={limit.text!r} fits no site: the cheapest, {sites[cost.cheapest].name}, takes {needed}; raise "
            f"keep{knobs}"
        )
    return budget
