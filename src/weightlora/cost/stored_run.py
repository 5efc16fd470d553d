"""What a run costs whose frozen blocks are stored: the time of each set of sites, from that of a step.

Below the lowest adapter a block runs in the first epoch alone, and only forward. So in all other epochs its forward
pass has the causes of its backward pass, and the solver that knows steps finds the best set of a run, floor included.
Where fewer steps are allowed, too, :class:`RunBudget` weighs each floor against them.
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
    forwards: tuple[int, ...]
    """Nanoseconds of the forward pass of each block."""
    epochs: float
    """Of the training."""
    selecting: int = 0
    """Nanoseconds of a mean step that the selection takes."""
    steps: int | None = None
    """Of the training, where they are known."""

    def above(self, floor: int) -> list[int]:
        """Return all sites above so many blocks."""
        under = self.below[floor - 1] if floor else 0
        return [i for i in range(self.cost.n) if not under >> i & 1]

    def of_floors(self) -> tuple[int, ...]:
        """Return the time with all sites above each of :data:`weightlora.plan.limits.FLOORS`."""
        return tuple(self.cost.of(self.above(floor)) for floor in floors_of(len(self.below)))

    @property
    def first(self) -> float:
        """The share of the steps in which rows are seen for the first time, and stored."""
        return 1 / max(self.epochs, 1.0)

    def time(self, kept: Sequence[int], share: float) -> float:
        """Return the time of these sites in a run of this share of the steps, as nanoseconds of a mean step of all."""
        each, once = self._parts(kept)
        return self.selecting + share * each + min(share, self.first) * once

    def step_share(self, kept: Sequence[int], limit: int) -> float:
        """Return the largest share of the steps for which the time of these sites is within a limit; 0 is none.

        Example:
            >>> step = make_cost(2, [Item(8, ((ANY, 4),)), Item(3, ((ANY, 1),)), Item(3, ((ANY, 3),))], [0, 1])
            >>> run = stored_run(step, [0.5, 0.5], [1, 3], 4, steps=100, selecting=0)
            >>> run.step_share([0, 1], 7), run.step_share([1], 7), run.step_share([1], 8)
            (0.5, 0.8571428571428571, 1.0)
        """
        each, once = self._parts(kept)
        left = limit - self.selecting
        within_first = left / (each + once)
        share = within_first if within_first <= self.first else (left - self.first * once) / each
        return min(max(share, 0.0), 1.0)

    def _parts(self, kept: Sequence[int]) -> tuple[float, int]:
        """What each step takes whatever is stored, and the forward pass below the floor."""
        sites = sum(1 << i for i in kept)
        once = sum(own for own, under in zip(self.forwards, self.below, strict=True) if not sites & under)
        return self.cost.of(kept) - self.selecting - self.first * once, once


@dataclass(frozen=True)
class RunBudget:
    """A share of LoRA's time for a whole run with a store, which fewer steps compete for with a higher floor.

    To first order a step of Adam lowers the loss by the sum of the trained sites' scores, and a run by that times its
    steps. Of all floors, each with all sites above it and as many steps as the time allows, the one with the largest
    product is taken. LoRA with fewer steps is the lowest floor.

    Example:
        >>> step = make_cost(2, [Item(8, ((ANY, 4),)), Item(3, ((ANY, 1),)), Item(3, ((ANY, 3),))], [0, 1])
        >>> budget = RunBudget(stored_run(step, [0.5, 0.5], [1, 3], 4, steps=100, selecting=0), 7)
        >>> budget.choose([1.0, 3.0]), budget.choose([1.0, 1.0])
        ([1], [0, 1])
    """

    run: StoredRun
    limit: int
    """Nanoseconds of a mean step."""

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the sites above the best floor; of equal ones the lowest."""
        floors = [self.run.above(floor) for floor in range(len(self.run.below))]
        return max(floors, key=lambda kept: self.gain(kept, sizes))

    def gain(self, kept: Sequence[int], sizes: Sequence[float]) -> float:
        """Return the expected fall of the loss, in that of one step."""
        return self.run.step_share(kept, self.limit) * sum(sizes[i] for i in kept)

    def gains(self, sizes: Sequence[float]) -> list[float]:
        """Return the gain of all sites, and of those above each of :data:`weightlora.plan.limits.FLOORS`.

        They are relative to LoRA's in all of its time.
        """
        floors = (0, *floors_of(len(self.run.below)))
        return [self.gain(self.run.above(floor), sizes) / (sum(sizes) or 1.0) for floor in floors]


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
    nanoseconds = [round(share * step.of([])) for share in forwards]
    moved = [round(own * saved) for own in nanoseconds]
    own = round(selecting * step.of_all / steps) if steps else 0
    items = [Item(amount, ((ANY, sites),)) for amount, sites in zip(moved, below, strict=True) if sites]
    always = Item(own - sum(moved), ((ANY, 1 << step.n),))
    cost = make_cost(step.n, [*step.items, *items, always], step.order)
    return StoredRun(cost, tuple(below), tuple(nanoseconds), epochs, own, steps)


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
        rounds: Timed steps, after one that is not; 0 is one step alone.
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
    shares = [_shares(model, blocks, losses) for _ in range(rounds + 1)]
    shares = shares[1:] or shares
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
