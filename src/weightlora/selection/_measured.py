"""Step time and peak memory of every set of sites, measured on the first batch where they are limited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from weightlora.cost.knapsack import Cost
from weightlora.cost.peak import MicroBatch, Peaks, raised
from weightlora.cost.saved_bytes import is_checkpointed
from weightlora.cost.step_time import time_cost
from weightlora.cost.stored_run import measured_run
from weightlora.errors import OptionError
from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.distributed import from_first
from weightlora.model.gathering import is_offloaded, is_partitioned
from weightlora.model.layers import lora_layers
from weightlora.model.modules import base_of
from weightlora.model.restore import untouched
from weightlora.plan.limits import Limits
from weightlora.selection.batches import FirstBatch
from weightlora.selection.steps import SHARE

if TYPE_CHECKING:
    from peft import LoraConfig

    from weightlora.selection._course import Course
    from weightlora.selection.allocate import Costs
    from weightlora.selection.scoring import Scoring

#: Rounds of timed steps where the training's length is not known.
_ROUNDS = 5
#: Steps of LoRA that a round takes: one by nodes, one with no adapter, one with the first and one with all.
_STEPS_OF_ROUND = 3.3
#: And with a store one more with no adapter.
_STEPS_OF_STORED_ROUND = 3.8
#: Sets that are chosen until the count of one is within the limit.
_CHOICES = 10
#: Bytes of the 16 levels of a weight in 4 bit.
_LEVELS = 64


def measuring_steps(scoring: Scoring) -> tuple[int, int]:
    """Return the rounds of timed steps, and about how many of the training's steps all measuring takes.

    Where the training's steps are known this is at most half of what a selection may take of them. Where that allows no
    round, a third of it, but at least one step, is measured node by node.
    """
    if scoring.time is None:
        return 0, int(scoring.memory is not None)
    each = _STEPS_OF_ROUND if scoring.epochs is None else _STEPS_OF_STORED_ROUND
    if scoring.total_steps is None:
        return _ROUNDS, round((_ROUNDS + 1) * each)
    most = SHARE * scoring.total_steps
    rounds = min(_ROUNDS, int(most / 2 / each) - 1)
    if rounds > 0:
        return rounds, round((rounds + 1) * each)
    return 0, max(int(most / 3), 1) + (scoring.epochs is not None)


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


def measured(costs: Costs, scoring: Scoring, course: Course, peaks: Peaks, first: FirstBatch) -> Costs:
    """Return the costs with time and memory where they are limited; all processes use the first one's numbers.

    Args:
        costs: In parameters.
        scoring: What is asked for.
        course: How the selection spends its steps.
        peaks: Of the model with plain LoRA on all sites.
        first: The batch that is measured.

    Raises:
        OptionError: Not even a single adapter fits into memory; with what would fit.
    """
    if scoring.bytes is not None:
        own = peaks.cost()
        memory = from_first(lambda: own)
        part = _micro_batch(peaks, first, scoring.bytes) if memory.of_all > scoring.bytes else None
        costs = replace(costs, memory=memory, micro_batch=from_first(lambda: part))
        fault = None if scoring.frees_rows and costs.micro_batch else _fault(memory, scoring.bytes, peaks, first)
        text = from_first(lambda: fault)
        if text is not None:
            raise OptionError(f"{scoring.text}: {text}")
    if scoring.time is not None:
        profiled = course.measuring - (scoring.epochs is not None)  # the other one times the blocks, below
        seconds = time_cost(peaks.model, first, rounds=course.rounds, profiled=profiled)
        costs = replace(costs, time=from_first(lambda: seconds))
        if scoring.epochs is not None:
            # Where blocks are timed in a single step, it has no adapters and so takes less than one of LoRA's.
            spared = 0 if course.rounds else 1 - seconds.of([]) / seconds.of_all
            run = measured_run(
                peaks.model,
                first,
                seconds,
                scoring.epochs,
                rounds=course.rounds,
                steps=scoring.total_steps,
                selecting=course.steps - spared,
            )
            costs = replace(costs, run=from_first(lambda: run), frees_steps=scoring.frees_steps)
    return costs


def within_memory(choose: Callable[[Costs], list[int]], costs: Costs, peaks: Peaks) -> tuple[list[int], int]:
    """Return the ranks that ``choose`` gives, and the peak that is counted for them.

    The cost in bytes of sets that were not counted may be too low. Where it is below the count of the chosen sites, the
    cost of all sets rises by the difference, and ``choose`` is asked again. So the count is within the limit.

    Args:
        choose: Returns ranks within the costs.
        costs: With memory.
        peaks: Of the model with plain LoRA on all sites.

    Raises:
        OptionError: Nothing fits.
    """
    memory = costs.memory
    assert memory is not None, "memory is limited"
    for attempt in range(_CHOICES):
        costs = replace(costs, memory=memory)
        ranks = choose(costs)
        kept = [i for i, r in enumerate(ranks) if r]
        own = peaks.of(kept)
        peak = from_first(lambda: own)  # noqa: B023
        if peak <= memory.of(kept):
            return ranks, peak + costs.growth(memory, ranks)
        memory = raised(memory, (peak - memory.of(kept)) * 2**attempt)
    raise OptionError("no set of sites was found that fits into memory; raise it, or limit adapters")


def _micro_batch(peaks: Peaks, first: FirstBatch, limit: int) -> MicroBatch | None:
    """The largest part of the batch, by halves, with which LoRA on all sites fits; None where none does."""
    parts, rows = 1, first.rows
    while rows % 2 == 0:
        parts, rows = 2 * parts, rows // 2
        peak = replace(peaks, losses=first.of_rows(rows)).of(range(len(lora_layers(peaks.model))))
        if peak <= limit:
            return MicroBatch(parts, rows, peak)
    return None


def _fault(memory: Cost, limit: int, peaks: Peaks, first: FirstBatch) -> str | None:
    """Why not even one adapter fits, and what would; None where one does."""
    if memory.of_all <= limit:
        return None
    one = [memory.cheapest]
    least = peaks.of(one)
    if least <= limit:
        return None
    name = list(lora_layers(peaks.model))[one[0]]
    text = f"with a single adapter, at {name}, a step takes {_size(least)}; "
    ways = {kind: f"{what} ({_size(size)})" for kind, what, size in _savings(peaks, first, one, least) if size <= limit}
    fitting = [*ways.values()]
    if not fitting:
        return text + "raise memory, or take a smaller model (no smaller batch, checkpointing or base in 4 bit fits)"
    return text + f"one fits with {', or '.join(fitting)}"


def _savings(peaks: Peaks, first: FirstBatch, kept: list[int], peak: int) -> Iterator[tuple[str, str, int]]:
    """Ways to save memory, each with its kind and its peak; of a kind the one that saves least comes last."""
    base = base_of(peaks.model)
    if isinstance(base, PreTrainedModel) and base.supports_gradient_checkpointing and not is_checkpointed(base):
        with untouched(peaks.model, seed=0, buffers=False):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            remove_input_hooks(base)
            yield "checkpointing", "gradient checkpointing", peaks.of(kept)
    for rows in sorted({first.rows // 2, first.rows // 4} - {0}):
        fewer = replace(peaks, losses=first.of_rows(rows))
        yield "rows", f"{rows} rows at once instead of {first.rows}", fewer.of(kept)
    layers: list[Any] = [layer.get_base_layer() for layer in lora_layers(peaks.model).values()]
    weights = [layer.weight for layer in layers if layer.weight.is_floating_point()]
    if weights:
        sizes = [weight.numel() * weight.element_size() for weight in weights]
        packed = sum(-(-weight.numel() // 2) + 4 * -(-weight.numel() // 64) + _LEVELS for weight in weights)
        yield "bits", "a base in 4 bit", peak - sum(sizes) + packed + max(sizes)  # one weight is unpacked at a time


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"
