"""What a run costs whose frozen blocks are stored: the time of each set of sites, from that of a step.

Below the lowest adapter a block runs in the first epoch alone, and only forward. So in all other epochs its forward
pass has the causes of its backward pass, and the solver that knows steps finds the best set of a run, floor included.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from weightlora.cost.knapsack import ANY, Cost, Item, make_cost
from weightlora.cost.saved_bytes import Losses, now
from weightlora.model.frozen_prefix import find_blocks
from weightlora.model.layers import lora_layers
from weightlora.plan.limits import floors_of


@dataclass(frozen=True)
class StoredRun:
    """The time of each set of sites in a run with a store, as a mean over its steps."""

    cost: Cost
    """Nanoseconds of a mean step; its part of the selection is in every set."""
    below: tuple[int, ...]
    """The sites in or below each block, the lowest first; a set is a whole number, as in a :class:`Cost`."""
    steps: int | None = None
    """Of the training, where they are known."""

    def of_floors(self) -> tuple[int, ...]:
        """Return the time with all sites above each of :data:`weightlora.plan.limits.FLOORS`."""
        under = [self.below[floor - 1] if floor else 0 for floor in floors_of(len(self.below))]
        return tuple(self.cost.of(i for i in range(self.cost.n) if not sites >> i & 1) for sites in under)


def stored_run(
    step: Cost, forwards: Sequence[float], below: Sequence[int], epochs: float, *, steps: int | None, selecting: float
) -> StoredRun:
    """Return the cost of a run with a store; its time is that of :func:`weightlora.plan.limits.run_time`.

    Args:
        step: Nanoseconds of a training step without a store.
        forwards: The share of each block, the lowest first, in a step without adapters.
        below: The sites in or below each block.
        epochs: Of the training.
        steps: Of the training.
        selecting: Steps of LoRA that the selection takes.

    Example:
        >>> step = make_cost(2, [Item(8, ((ANY, 4),)), Item(3, ((ANY, 1),)), Item(3, ((ANY, 3),))], [0, 1])
        >>> run = stored_run(step, [0.5, 0.5], [1, 3], 4, steps=100, selecting=0)
        >>> [step.of([site]) for site in (0, 1)], [run.cost.of([site]) for site in (0, 1)]
        ([14, 11], [14, 8])
    """
    saved = 1 - 1 / max(epochs, 1.0)
    moved = [round(share * step.of([]) * saved) for share in forwards]
    own = round(selecting * step.of_all / steps) if steps else 0
    items = [Item(amount, ((ANY, sites),)) for amount, sites in zip(moved, below, strict=True) if sites]
    always = Item(own - sum(moved), ((ANY, 1 << step.n),))
    return StoredRun(make_cost(step.n, [*step.items, *items, always], step.order), tuple(below), steps)


def measured_run(
    model: nn.Module,
    losses: Losses,
    step: Cost,
    epochs: float,
    *,
    rounds: int,
    steps: int | None = None,
    selecting: float = 0.0,
) -> StoredRun:
    """Return the cost of a run with a store, whose blocks' forward passes are timed in steps without adapters.

    Args:
        model: With LoRA on all sites, in the mode in which it is trained.
        losses: Runs the forward passes of a step.
        step: As of :func:`stored_run`.
        epochs: As of :func:`stored_run`.
        rounds: Timed steps, after one that is not.
        steps: As of :func:`stored_run`.
        selecting: As of :func:`stored_run`.

    Raises:
        OptionError: The model has no list of transformers' blocks.
    """
    layers = lora_layers(model)
    name, blocks = find_blocks(model)
    inner = [[i for i, site in enumerate(layers) if site.startswith(f"{name}.{k}.")] for k in range(len(blocks))]
    place = {site: k for k, site in enumerate(step.order)}
    lowest = min((place[i] for own in inner for i in own), default=0)
    under = sum(1 << i for i, k in place.items() if k < lowest)  # of embeddings, for instance
    below: list[int] = []
    for own in inner:
        under |= sum(1 << i for i in own)
        below.append(under)
    for layer in layers.values():
        layer.enable_adapters(False)
    shares = [_shares(model, blocks, losses) for _ in range(rounds + 1)][1:]
    for layer in layers.values():
        layer.enable_adapters(True)
    return stored_run(
        step, [*map(statistics.median, zip(*shares, strict=True))], below, epochs, steps=steps, selecting=selecting
    )


def _shares(model: nn.Module, blocks: Iterable[nn.Module], losses: Losses) -> list[float]:
    """The share of each block's forward pass in one step without adapters."""
    model.zero_grad()
    with _timed(blocks) as seconds:
        start = now()
        for loss in losses():
            if loss.requires_grad:  # False without a head that is trained
                loss.backward()
        whole = now() - start
    return [own / whole for own in seconds]


@contextmanager
def _timed(blocks: Iterable[nn.Module]) -> Generator[list[float]]:
    """Yield the seconds that each block takes within the context."""
    seconds: list[float] = []
    handles = []
    for k, block in enumerate(blocks):
        seconds.append(0.0)

        def begin(*_: object, k: int = k) -> None:
            seconds[k] -= now()

        def end(*_: object, k: int = k) -> None:
            seconds[k] += now()

        handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
