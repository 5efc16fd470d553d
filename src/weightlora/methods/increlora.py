"""IncreLoRA (Zhang et al. 2023, arXiv:2308.12043): every site starts at rank 1, and the most important ones grow.

ΔW = s·Σ_j e_j·b_j·a_j on each site. The next components train in reserve, with e frozen at 1e-5, until they are
promoted. A site's sensitivity is I = Σ|ΔW∘∂L/∂ΔW| / √(d_out·d_in); its score is the average of I times its uncertainty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import AttachedPlan, Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.methods.common.importance import Sensitivities
from weightlora.methods.common.schedules import growth, require_window, window
from weightlora.methods.common.triplets import (
    Alpha,
    attach_triplets,
    export_triplets,
    orthogonality_gradient,
    plan_under,
    require_steps,
    triplet_plan,
)
from weightlora.model.distributed import from_first
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_RESERVE = 1e-5  # the e of a component in reserve: almost no effect, but Adam still trains a and b
_STD = 0.02  # of a and b at the start, as in PEFT's AdaLoRA layers
_ROUNDS = 20  # rounds of growth without an interval


@dataclass(frozen=True)
class _Options:
    max_r: int | None
    count: int | None
    begin: float
    end: float
    interval: int | None
    restart: int | None
    beta1: float
    beta2: float
    orth_reg_weight: float
    alpha: Alpha
    seed: int


def build(
    *,
    max_r: int | None = None,
    count: int | None = None,
    begin: float = 0.05,
    end: float = 0.5,
    interval: int | None = None,
    restart: int | None = None,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.1,
    alpha: Alpha = "keep",
    seed: int = 0,
) -> Method:
    """Return the method.

    Args:
        max_r: Largest rank of a site. None: 2·r.
        count: Components that a site gains in a round, and those that it has in reserve. None: r/2.
        begin: Share of the training before the first round of growth.
        end: Share of the training at which the budget is reached.
        interval: Steps between rounds. None: a twentieth of the steps between ``begin`` and ``end``.
        restart: Steps in which the learning rate of new components rises to that of the others. None: ``interval``.
        beta1: Decay of the average sensitivity.
        beta2: Decay of the average of its uncertainty.
        orth_reg_weight: λ of the penalty that keeps the a_j and the b_j of a site orthogonal.
        alpha: ``"keep"`` scales by alpha over the site's current rank, as in the paper; ``"scale"`` scales every rank
            by alpha/r as in plain LoRA, so that growing changes no logit.
        seed: Decides the initial weights of components that enter the reserve later.

    Raises:
        OptionError: An argument is out of its range.
    """
    for name, value in (("count", count), ("interval", interval), ("restart", restart)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value} is not allowed: give at least 1")
    require_window(begin, end)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise OptionError(f"{name}={value} is not allowed: give a number in [0, 1)")
    return IncreLora(_Options(max_r, count, begin, end, interval, restart, beta1, beta2, orth_reg_weight, alpha, seed))


@dataclass(frozen=True)
class Components:
    """When each component of each site entered the reserve and was promoted, (sites, max_r); −1 = not yet.

    Attributes:
        reserved: The step from which a and b are trained.
        promoted: The step from which e is trained too, which makes the component a rank.
    """

    reserved: Tensor
    promoted: Tensor

    @classmethod
    def at_start(cls, sites: int, max_r: int, reserve: int) -> Components:
        """Return one rank for each site, and ``reserve`` components in reserve."""
        places = torch.arange(max_r).expand(sites, -1)
        return cls(torch.where(places <= reserve, 0, -1), torch.where(places < 1, 0, -1))

    @property
    def ranks(self) -> list[int]:
        """The number of promoted components of each site."""
        return (self.promoted >= 0).sum(dim=1).tolist()

    def grown(self, gains: Sequence[int], *, step: int, reserve: int) -> Components:
        """Return the components after ``gains`` promotions at each site, again with ``reserve`` in reserve.

        Example:
            >>> Components.at_start(2, max_r=4, reserve=1).grown([1, 0], step=7, reserve=1).reserved
            tensor([[ 0,  0,  7, -1],
                    [ 0,  0, -1, -1]])
        """
        ranks = torch.tensor(self.ranks) + torch.tensor(gains)
        places = torch.arange(self.promoted.shape[1])
        promoted, there = places < ranks[:, None], places < ranks[:, None] + reserve
        return Components(
            torch.where(there, self.reserved.where(self.reserved >= 0, step), -1),
            torch.where(promoted, self.promoted.where(self.promoted >= 0, step), -1),
        )


class IncreLora:
    """IncreLoRA as a method, and the mover that its callback calls."""

    _plan = AttachedPlan()

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._callback = MoverCallback(self)

    @property
    def plan(self) -> AdapterPlan:
        """``max_r`` at each site before the training, as in its checkpoints; then the current ranks."""
        plan = self._plan
        masks = dict(zip(self._layers, self._components.promoted >= 0, strict=True)) if self._begun else None
        return plan_under(plan, masks)

    def budget(self, step: int) -> int:
        """Return one rank for each site plus those of the rounds up to ``step``: equal shares of whole ``count``s."""
        sites, missing = len(self._layers), self._target - len(self._layers)
        if step < self._first:
            return sites
        if step >= self._last:
            return self._target
        rounds = 1 - (self._first - self._last) // self._interval  # the last step is a round, whatever the interval
        done = 1 + (step - self._first) // self._interval
        return sites + missing * done // (rounds * self._count) * self._count

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put ``max_r`` triplets on all sites: one with e = 0, the reserve with e = 1e-5, the others unused."""
        options, sites = self._options, find_sites(model, lora).sites
        max_r = 2 * lora.r if options.max_r is None else options.max_r
        _require_growth(lora.r, max_r)
        first, self._last = window(options.begin, options.end, total_steps)
        self._first = max(1, first)
        self._interval = options.interval or max(1, (self._last - self._first) // _ROUNDS)
        self._restart = options.restart or self._interval
        self._count = options.count or max(1, lora.r // 2)
        self._total, self._target, self._max_r = total_steps, len(sites) * lora.r, max_r
        record = {**asdict(options), "max_r": max_r, "interval": self._interval, "count": self._count}
        self._plan = triplet_plan(model, lora, sites, max_r, rule="increlora", options=record)
        fixed = {"total_step": total_steps, "orth_reg_weight": 0.0}
        attached = attach_triplets(model, lora, sites, init_r=max_r, alpha=options.alpha, name="increlora", **fixed)
        self._layers: dict[str, Any] = dict(lora_layers(attached))
        self._components = Components.at_start(len(sites), max_r, self._count)
        self._average, self._uncertainty = torch.zeros(len(sites)), torch.zeros(len(sites))
        self._sensitivities: Sensitivities | None = None
        self._slowed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._guards: list[RemovableHandle] = []
        self._begun = False
        self._settle(self._components)
        tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([tuner, tuner.model], "increlora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback: the penalty before, scores and growth after each optimizer step."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the promoted components.

        Raises:
            SelectionError: They are fewer than the budget: the method did not run to its end.
        """
        ranks = sum(self._components.ranks)
        if ranks < self._target:
            raise SelectionError(
                f"increlora has grown to {ranks} ranks, {self._target} are the budget: it did not run to its end; give "
                "the trainer callbacks=method.callbacks(), and train all of the steps"
            )
        self._plan, self._begun = export_triplets(model, self._plan, budget=self._target, name="increlora"), False
        self._remove_watch()
        return model

    def begin(self, total_steps: int) -> None:
        """Start measuring sensitivities, and mask the gradient of each e that is not promoted.

        Raises:
            OptionError: The training takes more steps than the schedule was made for, or fewer.
        """
        require_steps("increlora", self._total, total_steps)
        self._remove_watch()
        self._stop_watching()
        for guard in self._guards:
            guard.remove()
        self._begun = True
        self._sensitivities = Sensitivities(self._layers)
        self._guards = [
            layer.lora_E["default"].register_hook(partial(self._masked, i))
            for i, layer in enumerate(self._layers.values())
        ]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Add the gradient of the penalty, and copy what may move by only a part of the optimizer's step."""
        reserved, promoted = self._components.reserved, self._components.promoted
        weight = self._options.orth_reg_weight / (2 * len(self._layers))
        self._slowed = []
        for layer, since, e_since in zip(self._layers.values(), reserved, promoted, strict=True):
            (a, grad_a), (b, grad_b), (e, _) = _rows(layer)
            there = (since >= 0).to(a.device)
            for rows, gradient in ((a, grad_a), (b, grad_b)):
                if gradient is not None:
                    gradient[there] += weight * orthogonality_gradient(rows[there])
            for rows, start in ((a, since), (b, since), (e, e_since)):
                pace = self._pace(start, step)
                if bool((pace < 1).any()):
                    self._slowed.append((rows, rows.clone(), pace.to(rows).unsqueeze(1)))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Average the sensitivities; let sites grow in the rounds of the schedule."""
        self._remove_watch()
        for rows, before, pace in self._slowed:
            rows.copy_(before.lerp(rows, pace))
        old = self._components
        if sum(old.ranks) < self._target:
            self._average_sensitivities()
            self._grow(step)
        self._settle(old)
        if sum(self._components.ranks) == self._target:
            self._stop_watching()

    def state(self) -> dict[str, Tensor]:
        """Return the averages, and the steps at which components were reserved and promoted."""
        components = {"reserved": self._components.reserved, "promoted": self._components.promoted}
        return {"average": self._average, "uncertainty": self._uncertainty, **components}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Set them."""
        self._average, self._uncertainty = state["average"], state["uncertainty"]
        self._components = Components(state["reserved"], state["promoted"])
        self._settle(self._components)
        if sum(self._components.ranks) == self._target:
            self._stop_watching()

    def _stop_watching(self) -> None:
        """Measure no more sensitivities."""
        if self._sensitivities is not None:
            self._sensitivities.stop()
            self._sensitivities = None

    def _masked(self, i: int, gradient: Tensor) -> Tensor:
        """Return the gradient of a site's e, zero where it is not promoted."""
        return gradient * (self._components.promoted[i] >= 0).to(gradient).unsqueeze(1)

    def _average_sensitivities(self) -> None:
        """Update the averages with the last step's I: Ī ← β₁·Ī + (1−β₁)·I, Ū ← β₂·Ū + (1−β₂)·|I − Ī|."""
        beta1, beta2 = self._options.beta1, self._options.beta2
        assert self._sensitivities is not None, "begin() watches until the budget is reached"
        found = self._sensitivities.take()
        # A step that overflows, as with fp16's loss scale, changes nothing.
        found = found.where(found.isfinite(), self._average)
        self._average = beta1 * self._average + (1 - beta1) * found
        self._uncertainty = beta2 * self._uncertainty + (1 - beta2) * (found - self._average).abs()

    def _grow(self, step: int) -> None:
        """Promote components up to the budget at the sites with the highest scores."""
        ranks, budget = self._components.ranks, self.budget(step)
        if budget == sum(ranks):
            return
        scores = self._average * self._uncertainty
        total = budget - sum(ranks)
        gains = from_first(lambda: growth(scores.tolist(), ranks, total=total, count=self._count, max_r=self._max_r))
        reserve = 0 if budget == self._target else self._count
        self._components = self._components.grown(gains, step=step, reserve=reserve)
        # Weight decay has shrunk the unused components, so new ones are initialised again.
        generator = torch.Generator().manual_seed(self._options.seed + step)
        for layer, since in zip(self._layers.values(), self._components.reserved, strict=True):
            (a, _), (b, _), _ = _rows(layer)
            for rows in (a, b):
                new = (since == step).nonzero().flatten()
                rows[new.to(rows.device)] = (_STD * torch.randn(len(new), rows.shape[1], generator=generator)).to(rows)

    def _settle(self, old: Components) -> None:
        """Set each e that was not promoted in ``old``: 1e-5 in reserve, 0 if unused."""
        places = zip(old.promoted >= 0, self._components.reserved >= 0, self._components.ranks, strict=True)
        for layer, (kept, there, rank) in zip(self._layers.values(), places, strict=True):
            e = layer.lora_E["default"].detach().flatten()  # a view
            e.copy_(torch.where(kept.to(e.device), e, _RESERVE * there.to(e)))
            if self._options.alpha == "keep":
                layer.ranknum["default"].fill_(rank)

    def _pace(self, since: Tensor, step: int) -> Tensor:
        """Return the share of the optimizer's step that each component takes; those of the start take all of it."""
        return torch.where(since > 0, ((step - since) / self._restart).clamp(max=1), 1.0)


def _rows(layer: Any) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Return A (max_r, in), Bᵀ (max_r, out) and e (max_r, 1), a row for each component, each with its gradient."""
    a, b, e = (matrix["default"] for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    return (a.detach(), a.grad), (b.detach().T, None if b.grad is None else b.grad.T), (e.detach(), e.grad)


def _require_growth(r: int, max_r: int) -> None:
    if r < 2:
        raise OptionError(f"r={r} leaves nothing to grow, every site starts with one rank; give r of at least 2")
    if max_r <= r:
        raise OptionError(f"max_r={max_r} is not allowed: give more than r={r}, or no site can have more than another")
