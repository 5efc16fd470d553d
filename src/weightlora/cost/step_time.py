"""How long a training step of each set of sites would take, from the parts of a step with LoRA on all sites.

:class:`StepCost` measures in a run what its step costs: time against plain LoRA, saved bytes, peak parameters.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.cost.knapsack import ANY, Cause, Cost, Item, make_cost
from weightlora.cost.saved_bytes import LEAF, Losses, graph, leaf_causes, marked, now
from weightlora.files import write_json
from weightlora.model.layers import lora_layers


def time_cost(model: nn.Module, losses: Losses, *, rounds: int = 5, profiled: int = 1) -> Cost:
    """Nanoseconds of a training step: forward passes, backward passes and AdamW.

    A step has three parts: (1) the frozen model's forward pass and the head, which are always there; (2) the frozen
    model's backward pass down to the lowest site; (3) the adapters.

    The shares of layers in (2) and of sites in (3) are measured node by node, in steps of plain LoRA. The sums of (2)
    and (3) are measured in whole steps, where no clock is read: with no adapter, with the first site alone and with
    all sites. For these three sets the result is exact::

        all − first  = a · (adapters' shares but the first one's)
        first − none = b · (frozen model's shares below which the first site lies) + a · (first adapter's share)

    The factors a and b would be 1 if reading the clock took no time. All numbers are medians over the rounds; whole
    steps are medians of the ratios to the step with all sites.

    Args:
        model: A model with LoRA on all sites, in the mode in which it is trained. Its gradients are lost; nothing else
            of it changes.
        losses: Runs the forward passes; all of them count.
        rounds: Timed steps of each kind, after one untimed step. 0: steps are measured node by node alone, so that a
            and b are 1 and the result includes the reading of the clock.
        profiled: Steps that are measured so where ``rounds`` is 0; of three or more the first does not count.

    Raises:
        SelectionError: The loss depends on no trained parameter.
    """
    layers = lora_layers(model)
    n = len(layers)
    always = (ANY, 1 << n)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    profiles = [_profile(layers, losses, optimizer) for _ in range(rounds + 1 if rounds else profiled)]
    profiles = profiles[1:] if rounds or profiled > 2 else profiles
    order = profiles[0].order
    causes = sorted({cause for profile in profiles for cause in profile.seconds})
    shares = {c: statistics.median(profile.seconds.get(c, 0.0) for profile in profiles) for c in causes}
    own = make_cost(n, [Item(_ns(s), (c,)) for c, s in shares.items() if c[0] != ANY], order)
    frozen = [Item(_ns(s), (c,)) for c, s in shares.items() if c[0] == ANY and not c[1] & always[1]]
    below = make_cost(n, frozen, order)

    if not rounds:
        rest = max(0, _ns(statistics.median(each.whole for each in profiles)) - own.of_all - below.of_all)
        return make_cost(n, [*own.items, *below.items, Item(rest, (always,))], own.order)
    one, every = own.order[:1], range(n)
    none, first, whole = map(_ns, _steps(layers, losses, optimizer, [(), one, every], rounds))
    a = _factor(whole - first, own.of_all - own.of(one)) if n > 1 else 1.0
    b = _factor(first - none - a * own.of(one), below.of(one))
    items = [Item(round(factor * i.amount), i.causes) for factor, cost in ((a, own), (b, below)) for i in cost.items]
    return make_cost(n, [*items, Item(none, (always,))], own.order)


def interleaved(steps: Sequence[Callable[[], object]], rounds: int, *, warmups: int = 1) -> list[list[float]]:
    """Return the seconds of each step in each round; the steps are interleaved, in a random order in each round.

    Args:
        steps: Each does one step when called.
        rounds: Timed rounds.
        warmups: Untimed rounds before them.

    Example:
        >>> [quick, slow] = interleaved([lambda: sum(range(10)), lambda: sum(range(100_000))], rounds=3)
        >>> len(quick), median_ratio(slow, quick) > 1
        (3, True)
    """
    seconds: list[list[float]] = [[] for _ in steps]
    order, shuffler = list(range(len(steps))), random.Random(0)
    for _ in range(rounds + warmups):
        shuffler.shuffle(order)
        for place in order:
            start = now()
            steps[place]()
            seconds[place].append(now() - start)
    return [times[warmups:] for times in seconds]


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over rounds of ``seconds ÷ reference``; drift that is slower than a round cancels out."""
    return statistics.median(time / other for time, other in zip(seconds, reference, strict=True))


def step_seconds(model: nn.Module, losses: Losses, *, steps: int = 2) -> list[float]:
    """Seconds of each of ``steps`` training steps, after one untimed step; the parameters do not change."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    return [_step(losses, optimizer) for _ in range(steps + 1)][1:]


@dataclass(frozen=True)
class _Profile:
    """Seconds of one step of plain LoRA, by cause."""

    seconds: Mapping[Cause, float]
    order: tuple[int, ...]
    whole: float
    """Seconds of the step, with the reading of the clock."""


def _profile(layers: Mapping[str, LoraLayer], losses: Losses, optimizer: torch.optim.Optimizer) -> _Profile:
    """Time the adapters' forward passes, each node's backward pass and the optimizer's step.

    A node's time ends when the next node begins, so it includes adding up gradients.
    """
    optimizer.zero_grad()
    begin = now()
    seconds: dict[Cause, float] = {}
    with marked(layers) as marks:
        for loss in losses():
            below = graph(loss, leaf_causes(layers), 1 << len(layers))
            clock: list[tuple[Cause, float]] = []
            for node, sites in below.items():
                is_leaf = node.name() == LEAF
                own = sites if is_leaf and not sites >> len(layers) else ANY if is_leaf else marks.own(node)
                node.register_prehook(partial(_note, clock, (own, sites)))
            forwards = [((1 << site, 1 << site), t) for site, t in marks.forward_seconds()]
            loss.backward()
            ends = [start for _, start in clock[1:]] + [now()]
            backwards = [(cause, end - start) for (cause, start), end in zip(clock, ends, strict=True)]
            for cause, duration in (*forwards, *backwards):
                seconds[cause] = seconds.get(cause, 0.0) + duration
            marks.clear()
    start = now()
    optimizer.step()
    end = now()
    share = (end - start) / len(layers)
    for i in range(len(layers)):
        seconds[1 << i, 1 << i] = seconds.get((1 << i, 1 << i), 0.0) + share
    return _Profile(seconds, tuple(marks.order), end - begin)


def _note(clock: list[tuple[Cause, float]], cause: Cause, *_: Any) -> None:
    clock.append((cause, now()))


def _steps(
    layers: Mapping[str, LoraLayer],
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    sets: Sequence[Iterable[int]],
    rounds: int,
) -> list[float]:
    """Seconds of whole interleaved steps with each set of sites, from median ratios to the last set's step."""

    def step(kept: frozenset[int]) -> None:
        for i, layer in enumerate(layers.values()):
            layer.enable_adapters(i in kept)
        _step(losses, optimizer)

    seconds = interleaved([partial(step, frozenset(kept)) for kept in sets], rounds)
    for layer in layers.values():
        layer.enable_adapters(True)
    last = statistics.median(seconds[-1])
    return [last * median_ratio(times, seconds[-1]) for times in seconds]


def _step(losses: Losses, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one step."""
    optimizer.zero_grad()
    start = now()
    for loss in losses():
        if loss.requires_grad:  # False without adapters and head
            loss.backward()
    optimizer.step()
    return now() - start


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)


def _factor(measured: float, shares: float) -> float:
    return max(measured, 0.0) / shares if shares else 0.0


# -- in a run ----------------------------------------------------------------------------------------------------------


class Peak:
    """Counts what optimizers hold while :meth:`watched`."""

    def __init__(self) -> None:
        self.parameters = 0
        """Most trained numbers of any optimizer that took a step, a head's included."""

    @contextmanager
    def watched(self) -> Generator[None]:
        """Look at every optimizer step of the block, those of a selection too."""
        handle = register_optimizer_step_post_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        held = {id(p): p.numel() for group in optimizer.param_groups for p in group["params"]}
        self.parameters = max(self.parameters, sum(held.values()))


class StepCost(TrainerCallback):
    """Writes ``{step_ratio, saved_bytes, peak_parameters, measuring_seconds}`` to a file when the training ends.

    The ratio compares a step of the trained model with one of plain LoRA on all candidates in stock PEFT. The steps
    are interleaved in this process; what a method's callback does between steps is not counted.

    Args:
        path: The file.
        rounds: Steps timed; 0 writes the peak alone.
        peak: Looks at the run from outside.
    """

    def __init__(self, path: Path, rounds: int, peak: Peak) -> None:
        self._path, self._rounds, self._peak = path, rounds, peak
        self._plain: Any = None
        self._head = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Keep plain LoRA and count its head, before the method changes the model."""
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        self._head = sum(count for name, count in trained.items() if "modules_to_save" in name)
        if self._rounds:
            lora = copy.deepcopy(model.peft_config["default"])
            lora.use_dora = False
            with torch.random.fork_rng():
                self._plain = get_peft_model(copy.deepcopy(model).unload(), lora)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure; weights and random numbers stay what they are."""
        start = now()
        cost: dict[str, Any] = {"peak_parameters": self._peak.parameters - self._head}
        if self._rounds:
            with torch.random.fork_rng():
                batch = next(iter(train_dataloader))
                self._plain.to(next(model.parameters()).device)
                cost["saved_bytes"] = saved_bytes(model.train(), batch)
                ratios = step_ratios({"plain": self._plain, "own": model}, batch, rounds=self._rounds)
                cost["step_ratio"] = round(ratios["own"], 4)
            self._plain = None
        cost["measuring_seconds"] = now() - start  # the trainer's own clock runs on meanwhile
        write_json(self._path, cost)


def step_ratios(models: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor], *, rounds: int) -> dict[str, float]:
    """Return each model's step time ÷ the first model's: medians of interleaved steps in this process.

    AdamW really steps, at a learning rate of 0: the weights stay what they are.
    """

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = [[p for p in model.parameters() if p.requires_grad] for model in models.values()]
    optimizers = [torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) for parameters in trained]
    seconds = interleaved([partial(step, *pair) for pair in zip(models.values(), optimizers, strict=True)], rounds)
    return {name: median_ratio(times, seconds[0]) for name, times in zip(models, seconds, strict=True)}


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """Return the bytes that autograd holds for the backward pass: each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # a kept output would keep its graph alive, and the graph the output
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
