"""The peak of the device in a training step of a real model, for any set of its adapters.

A step is counted for one set (:func:`record_real_step`). For all sets there is a :class:`Cost`, made of a few counts:
what the adapters and the backward pass down to the lowest one take, and a constant. It is exact for the set of all
sites. For others it may be lower than their count, by what a step makes for a moment; :func:`raised` corrects it then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import nn

from weightlora.cost._allocations import Device
from weightlora.cost.knapsack import ANY, Cost, Item, make_cost
from weightlora.cost.memory import StepBytes, byte_grain, optimizer_bytes, weight_bytes
from weightlora.cost.saved_bytes import Losses, is_checkpointed, marked, parameter_cost, record_real_step, saved_cost
from weightlora.model.gathering import device_of
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import block_of

#: The optimizer that is counted. Its fused form, transformers' default, keeps as much and makes less for a moment.
_OPTIMIZER = "adamw_torch"
#: Bytes for the scratch memory of kernels, which no operation shows: of attention on a CPU, for each thread (at most
#: 73 kB were measured), and torch's workspace for products on a GPU (not measured).
_SCRATCH = {"cpu": 2**17, "cuda": 2**25}
#: What a model raises where its course depends on values that fake tensors lack.
_WITHOUT_VALUES = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch, with which LoRA on all sites takes less memory; the others are accumulated."""

    parts: int
    """Of a batch."""
    rows: int
    """At once."""
    peak: int
    """Bytes with LoRA on all sites."""


@dataclass(frozen=True)
class Peaks:
    """Counts a training step of one model on one batch; the model stays as it was.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
        >>> peaks = Peaks.of_model(model, lambda: [model(torch.ones(50, 64)).sum()])
        >>> cost = peaks.cost()
        >>> cost.of_all == peaks.of([0, 1]) > peaks.of([1])
        True
    """

    model: nn.Module
    losses: Losses
    trained: tuple[nn.Parameter, ...]
    """Adapters of all sites, and what is trained besides."""
    vectors: int

    @classmethod
    def of_model(cls, model: nn.Module, losses: Losses, *, vectors: int = 0) -> Peaks:
        """Return the counts of a model that trains what requires a gradient now.

        Args:
            model: With LoRA on all sites, in the mode in which it is trained.
            losses: Runs the forward passes of the batch.
            vectors: Further vectors, as long as a layer's output, that each adapter is going to have.
        """
        return cls(model, losses, tuple(p for p in model.parameters() if p.requires_grad), vectors)

    def of(self, kept: Iterable[int]) -> int:
        """Count the peak, in bytes, with adapters at exactly these sites."""
        sites = frozenset(kept)
        besides = 0
        if self.vectors:
            besides = self._parameters(self.vectors).of(sites) - self._parameters().of(sites)
        device = self._device
        scratch = _SCRATCH[device] * (torch.get_num_threads() if device == "cpu" else 1)
        return self._counted(sites)[0].memory().peak + besides + scratch

    def cost(self) -> Cost:
        """Return the peak of every set, equal to the count for the set of all sites.

        Under gradient checkpointing it is equal to the count for each lowest block from which all sites are kept, too:
        blocks whose names differ in a number alone keep as much as each other.
        """
        parameters = self._parameters(self.vectors)
        if is_checkpointed(self.model):
            return self._by_floors(parameters)
        held = self._saved() + parameters
        return raised(held, self.of(range(held.n)) - held.of_all)

    @property
    def _device(self) -> Device:
        return "cpu" if device_of(self.model).type == "cpu" else "cuda"

    def _counted(self, kept: Collection[int]) -> tuple[StepBytes, tuple[int, ...]]:
        """The bytes of a step, and the sites in the order of the forward pass."""
        try:
            return self._step(kept, fake=True)
        except _WITHOUT_VALUES:
            return self._step(kept, fake=False)

    def _step(self, kept: Collection[int], *, fake: bool) -> tuple[StepBytes, tuple[int, ...]]:
        device = self._device
        with untouched(self.model, seed=0, buffers=not fake):
            self._let_train()
            layers = lora_layers(self.model)
            dropped: list[Any] = [layer for i, layer in enumerate(layers.values()) if i not in kept]
            absent = sum(_bytes(p) for layer in dropped for p in layer.parameters() if p.requires_grad)
            for layer in dropped:
                layer.enable_adapters(False)
            with marked(layers) as marks:
                allocations = record_real_step(self.model, self.losses, fake=fake)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return StepBytes(
                trained=sum(p.numel() for p in trained),
                rows=0,
                weights=weight_bytes(self.model) - absent,
                gathered=0,
                optimizer=optimizer_bytes(_OPTIMIZER, trained, device),
                shards=1,
                grain=byte_grain(device),
                allocations=allocations,
                growth=None,
            ), tuple(marks.order)

    def _saved(self) -> Cost:
        """What autograd holds at the end of the forward pass."""
        try:
            return self._saved_by(fake=True)
        except _WITHOUT_VALUES:
            return self._saved_by(fake=False)

    def _saved_by(self, *, fake: bool) -> Cost:
        with untouched(self.model, seed=0, buffers=not fake):
            self._let_train()
            return saved_cost(self.model, self.losses, fake=fake)

    def _parameters(self, vectors: int = 0) -> Cost:
        with untouched(self.model, seed=0, buffers=False):
            self._let_train()
            return parameter_cost(self.model, vectors=vectors)

    def _let_train(self) -> None:
        """Let the parameters require gradients as in the training: a rule that scores may have changed that."""
        trained = set(map(id, self.trained))
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _by_floors(self, parameters: Cost) -> Cost:
        """The peak for each lowest block, from the counts with all sites from there on.

        Checkpointing keeps the input of each block from the lowest adapter on, and the backward pass computes one block
        at a time anew. So within a block the lowest site decides nothing, but in the last one.
        """
        n, names = parameters.n, list(lora_layers(self.model))
        _, order = self._counted(range(n))
        floors = _floors([*dict.fromkeys([*order, *range(n)])], names)
        ends = [i for i, floor in enumerate(floors) if {floor.kind} != {f.kind for f in floors[max(i - 1, 0) : i + 2]}]
        ends = sorted({0, *ends, len(floors) - 1})
        heights = _heights({i: self.of(floors[i].sites) - parameters.of(floors[i].sites) for i in ends})
        items = [Item(heights[0], ((ANY, 1 << n),))]
        for above, (higher, lower) in zip(floors, pairwise(heights), strict=False):
            further = set(range(n)) - set(above.sites)
            items.append(Item(lower - higher, ((ANY, sum(1 << i for i in further)),)))
        return make_cost(n, [*parameters.items, *items], order)


@dataclass(frozen=True)
class _SitesFrom:
    """All sites from a block on."""

    kind: str
    """The name of the block without its number."""
    sites: tuple[int, ...]


def _floors(order: Sequence[int], names: Sequence[str]) -> list[_SitesFrom]:
    """The last site alone, then all sites from each block on, the last block first."""
    floors = [_SitesFrom("", (order[-1],))]
    blocks = [(block, tuple(sites)) for block, sites in groupby(order, key=lambda i: block_of(names[i]))]
    kept: tuple[int, ...] = ()
    for block, sites in reversed(blocks):
        kept = (*sites, *kept)
        floors.append(_SitesFrom(block.rpartition(".")[0] or "no number", kept))
    return floors


def _heights(counted: Mapping[int, int]) -> list[int]:
    """The height of every floor: never below one above it, and in between on a straight line, rounded up."""
    heights = [counted[0]]
    for above, below in pairwise(sorted(counted)):
        start, rise = heights[-1], max(0, counted[below] - heights[-1])
        heights += [start - -rise * step // (below - above) for step in range(1, below - above + 1)]
    return heights


def raised(cost: Cost, amount: int) -> Cost:
    """Return the cost of all sets with a constant on top."""
    return make_cost(cost.n, [*cost.items, Item(amount, ((ANY, 1 << cost.n),))], cost.order)


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()
