"""Step time and peak memory of every set of sites, measured on the first batch where they are limited."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from weightlora.cost.knapsack import ANY, Cost, Item, make_cost
from weightlora.cost.saved_bytes import Losses, parameter_cost, saved_cost
from weightlora.cost.step_time import time_cost
from weightlora.errors import OptionError
from weightlora.model.distributed import from_first
from weightlora.model.gathering import is_offloaded, is_partitioned
from weightlora.model.sites import output_vectors
from weightlora.plan.limits import Limits
from weightlora.selection.steps import SHARE

if TYPE_CHECKING:
    from peft import LoraConfig

    from weightlora.selection.allocate import Costs
    from weightlora.selection.scoring import Scoring

#: Rounds of timed steps where the training's length is not known.
_ROUNDS = 5
#: Steps of LoRA that a round takes: one by nodes, one with no adapter, one with the first and one with all.
_STEPS_OF_ROUND = 3.3


def measuring_steps(scoring: Scoring) -> tuple[int, int]:
    """Return the rounds of timed steps, and about how many of the training's steps all measuring takes.

    Where the training's steps are known this is at most half of what a selection may take of them, if one step is not
    more than that.
    """
    if scoring.time is None:
        return 0, int(scoring.memory is not None)
    if scoring.total_steps is None:
        return _ROUNDS, round((_ROUNDS + 1) * _STEPS_OF_ROUND)
    rounds = min(_ROUNDS, int(SHARE / 2 * scoring.total_steps / _STEPS_OF_ROUND) - 1)
    return (rounds, round((rounds + 1) * _STEPS_OF_ROUND)) if rounds > 0 else (0, 1)


def require_measurable(limits: Limits, model: nn.Module, lora: LoraConfig, costs: Costs) -> None:
    """Raise where a step of ``model`` does not take the memory and time that a training takes.

    Raises:
        OptionError: Its weights are loaded for each module, the training is DoRA, which needs other memory, or some
            adapters are not chosen.
    """
    text = limits.text
    if limits.memory is not None and lora.use_dora:
        raise OptionError(
            f"{text} is measured with plain LoRA, and use_dora=True saves about twice as much for the backward pass; "
            "leave use_dora out, or limit adapters or parameters"
        )
    if is_offloaded(model) or is_partitioned(model):
        raise OptionError(
            f"{text} is measured on a step, and this model's weights are loaded from elsewhere in each; limit adapters "
            "or parameters"
        )
    if costs.besides:
        raise OptionError(
            f"{text} cannot be measured with target_parameters, whose adapters the scoring leaves out; limit adapters "
            "or parameters"
        )


def measured(
    costs: Costs, limits: Limits, attached: nn.Module, losses: Losses, lora: LoraConfig, *, rounds: int
) -> Costs:
    """Return the costs with time and memory where they are limited; all processes use the first one's numbers.

    Args:
        costs: In parameters.
        limits: What is asked for.
        attached: The model with plain LoRA on all sites.
        losses: Runs the forward passes of the first batch.
        lora: Bytes also count the vectors that it adds to plain LoRA's parameters.
        rounds: Of timed steps.
    """
    if limits.memory is not None:
        own = _peak_cost(attached, losses, output_vectors(lora))
        costs = replace(costs, memory=from_first(lambda: own))
    if limits.time is not None:
        seconds = time_cost(attached, losses, rounds=rounds)
        costs = replace(costs, time=from_first(lambda: seconds))
    return costs


def _peak_cost(attached: nn.Module, losses: Losses, vectors: int) -> Cost:
    """Bytes at the peak: frozen weights, trained parameters with gradients and AdamW's state, and activations."""
    saved = saved_cost(attached, losses) + parameter_cost(attached, vectors=vectors)
    frozen = sum(p.numel() * p.element_size() for p in attached.parameters() if not p.requires_grad)
    return make_cost(saved.n, [*saved.items, Item(frozen, ((ANY, 1 << saved.n),))], saved.order)
