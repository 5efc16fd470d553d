"""Hearing the gates: the two rules, run on a model that already carries plain LoRA on every site."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm

from weightlora.cost.knapsack import CostBudget
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.model.distributed import average_gradients, copy_from_first
from weightlora.model.gates import gated
from weightlora.plan.budget import Budget
from weightlora.selection.rules.stoiht import THRESHOLDS, Threshold, stoiht_step

Rule = Literal["first_order", "stoiht"]
RULES: tuple[str, ...] = get_args(Rule)
Loss = Callable[[nn.Module, Any], Tensor | Iterable[Tensor]]
"""``loss_fn(model, batch)``: one number, or one after the other those of micro-batches whose gradients add up."""
_NO_BATCH = "batches is empty; give at least one batch, best one for each warm-up step"


@dataclass(frozen=True)
class WarmupOptions:
    """How the gates are heard; the arguments of :func:`weightlora.select`, checked.

    Raises:
        OptionError: A value is out of its range.
    """

    rule: Rule = "first_order"
    steps: int = 20
    head_steps: int = 0
    threshold_every: int = 1
    threshold: Threshold = "magnitude"
    lr: float = 1e-3
    gate_lr: float = 5.0

    def __post_init__(self) -> None:
        for name in ("steps", "head_steps", "threshold_every"):
            _require(isinstance(getattr(self, name), int), f"{name}={getattr(self, name)!r}", "a whole number")
        _require(self.rule in RULES, f"rule={self.rule!r}", f"one of {', '.join(RULES)}")
        _require(self.steps >= 2, f"steps={self.steps}", "at least 2: with B = 0 the first gradient of ω is zero")
        _require(self.head_steps >= 0, f"head_steps={self.head_steps}", "0 or more")
        _require(self.threshold_every >= 1, f"threshold_every={self.threshold_every}", "1 (the paper) or more")
        _require(self.threshold in THRESHOLDS, f"threshold={self.threshold!r}", f"one of {', '.join(THRESHOLDS)}")
        _require(0 < self.lr < float("inf"), f"lr={self.lr}", "a positive number")
        _require(0 < self.gate_lr < float("inf"), f"gate_lr={self.gate_lr}", "a positive number")


@dataclass(frozen=True)
class Heard:
    """What a rule found, in the order of the sites."""

    scores: tuple[float, ...]
    history: tuple[tuple[float, ...], ...]
    kept: tuple[int, ...]
    """Positions of the survivors: within the budget and with a positive score."""


@dataclass(frozen=True)
class Stage:
    """A model in its warm-up: plain LoRA on all sites, and what each step needs."""

    model: nn.Module
    layers: Mapping[str, LoraLayer]
    head: Sequence[nn.Parameter]
    """The parameters that are trained as a whole (``modules_to_save``)."""
    batches: Iterator[Any]
    loss_fn: Loss
    progress: tqdm[Any]

    def parameters(self, matrix: Literal["lora_A", "lora_B"]) -> list[nn.Parameter]:
        """A or B of every site, in the order of the sites."""
        return [getattr(layer, matrix)["default"].weight for layer in self.layers.values()]

    def backward(self, what: str, step: int, watched: Sequence[Tensor]) -> None:
        """Add the gradients of the next batch's loss.

        Args:
            what: Name of the phase, for the error.
            step: 1-based step, for the error.
            watched: The tensors whose gradients must be finite.

        Raises:
            SelectionError: The loss is no finite number, has no gradient, or a gradient is not finite.
        """
        where = f"{what} step {step}"
        for loss in in_parts(self.model, next(self.batches), self.loss_fn):
            _require_loss(loss, where)
            # A loss that switched the adapters off for a moment, as DPO's does, has let all of them have gradients.
            _only(watched, self.model)
            loss.backward()
        average_gradients(watched)
        gradients = [tensor.grad for tensor in watched if tensor.grad is not None]
        if gradients and not bool(torch.isfinite(nn.utils.get_total_norm(gradients))):
            raise SelectionError(f"{where}: a gradient is not finite; lower lr or look at that batch")
        self.progress.set_description(what)
        self.progress.update()


def hear(stage: Stage, options: WarmupOptions, budget: Budget | CostBudget) -> Heard:
    """Train the head for ``head_steps``, then hear the gates by the rule.

    Raises:
        SelectionError: No gate had a gradient, fewer sites survived than the budget allows, or a loss or gradient
            was not finite.
    """
    if options.head_steps > 0:
        _train_head(stage, options)
    # The gates (or gains) after each step, and whether each ever had a gradient.
    history, moved = (_first_order if options.rule == "first_order" else _stoiht)(stage, options, budget)
    _require_heard([name for name, some in zip(stage.layers, moved, strict=True) if not some], options, len(moved))
    scores = history[-1]
    sizes = [abs(score) for score in scores] if options.threshold == "magnitude" else list(scores)
    wanted = budget.choose(sizes)
    kept = tuple(i for i in wanted if scores[i] > 0)
    if len(kept) < max(1, len(wanted)):
        knobs = [f"keep to {len(kept)}"] * bool(kept) + ["gate_lr", "steps"] * (options.rule == "stoiht")
        raise SelectionError(
            f"only {len(kept)} of the {len(wanted)} wanted sites survived with a positive gate; "
            f"lower {' or '.join(knobs)}"
        )
    return Heard(scores, tuple(history), kept)


def cycled(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """Yield ``steps`` batches, starting over with a warning where there are fewer.

    Raises:
        SelectionError: There is no batch at all.
    """
    seen: list[Any] = []
    for batch in itertools.islice(batches, steps):
        seen.append(batch)
        yield batch
    if not seen:
        raise SelectionError(_NO_BATCH)
    if len(seen) < steps:
        warnings.warn(
            f"{len(seen)} batches for {steps} warm-up steps: they are used again; give more batches or fewer steps",
            WeightLoraWarning,
            stacklevel=2,
        )
        yield from itertools.islice(itertools.cycle(seen), steps - len(seen))


def peeked(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first batch, and all of them.

    Raises:
        SelectionError: There is none.
    """
    iterator = iter(batches)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise SelectionError(_NO_BATCH)


def in_parts(model: nn.Module, batch: Any, loss_fn: Loss) -> Iterable[Any]:
    """The loss of ``batch``, on the model's device, or those of its micro-batches one after the other."""
    losses: Any = loss_fn(model, to_device(batch, _device(model)))
    return [losses] if isinstance(losses, Tensor) or not isinstance(losses, Iterable) else losses


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The default ``loss_fn``: ``model(**batch).loss``.

    Raises:
        SelectionError: The batch is no mapping, or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise SelectionError(f"a batch is {_kind(batch)}; give dicts, or a loss_fn(model, batch) that reads yours")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise SelectionError("the model returned no loss; put labels into the batches, or give a loss_fn(model, batch)")
    return loss


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with the tensors of a mapping on ``device``; anything else as it is."""
    if not isinstance(batch, Mapping):
        return batch
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _train_head(stage: Stage, options: WarmupOptions) -> None:
    """Train the head alone: its random weights would otherwise decide the first gradients."""
    for layer in stage.layers.values():
        layer.enable_adapters(False)  # with B = 0 they add nothing but time
    let_train(stage, stage.head)
    optimizer = torch.optim.AdamW(stage.head, lr=options.lr)
    for step in range(1, options.head_steps + 1):
        stage.backward("head", step, stage.head)
        optimizer.step()
        optimizer.zero_grad()
    for layer in stage.layers.values():
        layer.enable_adapters(True)


def _first_order(
    stage: Stage, options: WarmupOptions, _: Budget | CostBudget
) -> tuple[list[tuple[float, ...]], list[bool]]:
    """‖mean ∂L/∂B‖₁ of each site over T batches, nothing moving.

    With B = 0 and a first Adam step of −lr·sign(∂L/∂B), the gate's gradient is −lr·‖∂L/∂B‖₁ (methods.md §1.4): this
    is the gate's gain to first order, without η, lr or overshoot, and with the noise of the batches averaged out.
    """
    matrices = stage.parameters("lora_B")
    let_train(stage, matrices)
    history: list[tuple[float, ...]] = []
    for step in range(1, options.steps + 1):
        stage.backward("gates", step, matrices)  # .grad is left to add up
        gains = [torch.zeros(()) if b.grad is None else b.grad.float().abs().sum() / step for b in matrices]
        history.append(tuple(torch.stack([gain.cpu() for gain in gains]).tolist()))
    return history, [gain > 0 for gain in history[-1]]


def _stoiht(
    stage: Stage, options: WarmupOptions, budget: Budget | CostBudget
) -> tuple[list[tuple[float, ...]], list[bool]]:
    """The paper's phase 1: A, B and head by AdamW, ω by stochastic iterative hard thresholding."""
    trained = [*stage.parameters("lora_A"), *stage.parameters("lora_B"), *stage.head]
    let_train(stage, trained)
    optimizer = torch.optim.AdamW(trained, lr=options.lr)
    history: list[tuple[float, ...]] = []
    moved = torch.zeros(len(stage.layers), dtype=torch.bool)
    with gated(stage.layers) as gates:
        for step in range(1, options.steps + 1):
            stage.backward("gates", step, [*trained, *gates.ears])
            cut = step % options.threshold_every == 0 or step == options.steps
            gradient = gates.gradient
            moved |= gradient != 0
            omega = stoiht_step(
                gates.omega,
                gradient,
                gate_lr=options.gate_lr,
                budget=budget if cut else None,
                threshold=options.threshold,
            )
            optimizer.step()
            gates.write(omega)
            optimizer.zero_grad()
            gates.clear()
            history.append(tuple(omega.tolist()))
    return history, moved.tolist()


def _require_heard(unheard: Sequence[str], options: WarmupOptions, sites: int) -> None:
    """Raise where no gate had a gradient in the whole warm-up, and name one of those that had none."""
    if len(unheard) == sites:
        raise SelectionError(
            f"no gate had a gradient in {options.steps} warm-up steps, so nothing tells the sites apart; "
            "does the loss depend on the adapted layers?"
        )
    if unheard:
        warnings.warn(
            f"{len(unheard)} of {sites} sites had no gradient in the warm-up, {unheard[0]} among them: the loss does "
            "not depend on them, and their gates say nothing; leave them out of target_modules",
            WeightLoraWarning,
            stacklevel=2,
        )


def let_train(stage: Stage, wanted: Sequence[nn.Parameter]) -> None:
    """Let exactly ``wanted`` have gradients; autograd does no work for the rest."""
    for parameter in stage.model.parameters():
        parameter.grad = None
    _only(wanted, stage.model)
    copy_from_first(wanted)


def _only(wanted: Sequence[Tensor], model: nn.Module) -> None:
    """Let the parameters of ``model`` that are ``wanted`` require gradients, and no others."""
    chosen = set(map(id, wanted))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _require_loss(loss: object, where: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise SelectionError(f"{where}: the loss is {_kind(loss)}; loss_fn must return one number as a tensor")
    if not loss.requires_grad:
        raise SelectionError(f"{where}: the loss has no gradient; does loss_fn detach it or run without gradients?")
    if not bool(torch.isfinite(loss)):
        raise SelectionError(f"{where}: the loss is {loss.item()}; lower lr or look at that batch")


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _require(condition: bool, found: str, allowed: str) -> None:
    if not condition:
        raise OptionError(f"{found} is not allowed: give {allowed}")
