"""IncreLoRA (Zhang et al. 2023, arXiv:2308.12043): every site starts at rank 1, and the most important ones grow.

ΔW = s·Σ_j e_j·b_j·a_j on each site. The next components train in reserve, with e frozen at 1e-5, until they are
promoted. A site's sensitivity is I = Σ|ΔW∘∂L/∂ΔW| / √(d_out·d_in), an estimate of what removing ΔW costs; its score is
the average of I times its uncertainty. ∂L/∂ΔW = gᵀ·x, with x the site's input and g the gradient of its output, which
the backward pass knows. The sum is computed for a block of rows at a time, without a matrix of ΔW's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.errors import OptionError
from weightlora.methods.base import Start, recorded
from weightlora.methods.families.moving import Attached, growth, require_window, window
from weightlora.methods.families.triplets import Alpha, TripletMethod
from weightlora.model.distributed import average, from_first, process_count, require_agreement
from weightlora.validation import Count, NotNegative, Share

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_RESERVE = 1e-5  # the e of a component in reserve: almost no effect, but Adam still trains a and b
_STD = 0.02  # of a and b at the start, as in PEFT's AdaLoRA layers
_ROUNDS = 20  # rounds of growth without an interval
_ENTRIES = 2**20  # entries of ∂L/∂ΔW computed at once


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


@dataclass(kw_only=True, eq=False)
class IncreLora(TripletMethod):
    """IncreLoRA.

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
        OptionError: ``begin`` does not come before ``end``.
    """

    max_r: Count | None = None
    count: Count | None = None
    begin: float = 0.05
    end: float = 0.5
    interval: Count | None = None
    restart: Count | None = None
    beta1: Share = 0.85
    beta2: Share = 0.85
    orth_reg_weight: NotNegative = 0.1
    alpha: Alpha = "keep"
    seed: int = 0
    name = "increlora"

    def __post_init__(self) -> None:
        require_window(self.begin, self.end)

    def most_ranks(self, step: int) -> int:
        """Return one rank for each site plus those of the rounds up to ``step``: equal shares of whole ``count``s."""
        sites, missing = len(self._layers), self._low - len(self._layers)
        if step < self._first:
            return sites
        if step >= self._last:
            return self._low
        rounds = 1 - (self._first - self._last) // self._every  # the last step is a round, whatever the interval
        done = 1 + (step - self._first) // self._every
        return sites + missing * done // (rounds * self._gain) * self._gain

    def _start(self, start: Start) -> Attached:
        """Put ``max_r`` triplets on all sites: one with e = 0, the reserve with e = 1e-5, the others unused."""
        r = start.lora.r
        max_r = 2 * r if self.max_r is None else self.max_r
        _require_growth(r, max_r)
        first, self._last = window(self.begin, self.end, self._total)
        self._first, self._max_r = max(1, first), max_r
        self._every = self.interval or max(1, (self._last - self._first) // _ROUNDS)
        self._gain = self.count or max(1, r // 2)
        options = {**recorded(self, max_r=max_r, interval=self._every, count=self._gain), "seed": self.seed}
        return self._triplets(start, max_r, options, orth_reg_weight=0.0)

    def _ready(self) -> None:
        sites = len(self._layers)
        self._components = Components.at_start(sites, self._max_r, self._gain)
        self._average, self._uncertainty = torch.zeros(sites), torch.zeros(sites)
        self._sensitivities: Sensitivities | None = None
        self._slowed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._settle(self._components)

    def _in_force(self) -> Mapping[str, Tensor]:
        return dict(zip(self._layers, self._components.promoted >= 0, strict=True))

    def _missing(self, ranks: int) -> str | None:  # noqa: ARG002 - what is in reserve does not count
        grown = sum(self._components.ranks)
        return None if grown == self._low else f"has grown to {grown} ranks, {self._low} are the budget"

    def before_training(self, total_steps: int) -> None:
        """Start measuring sensitivities, and mask the gradient of each e that is not promoted.

        Raises:
            OptionError: The training takes more steps than the schedule was made for, or fewer.
        """
        super().before_training(total_steps)
        self._stop_watching()
        self._sensitivities = Sensitivities(self._layers)
        self._mask_gradients([layer.lora_E["default"] for layer in self._layers.values()], self._masked)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Add the gradient of the penalty, and copy what may move by only a part of the optimizer's step."""
        reserved, promoted = self._components.reserved, self._components.promoted
        weight = self.orth_reg_weight / (2 * len(self._layers))
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
        for rows, before, pace in self._slowed:
            rows.copy_(before.lerp(rows, pace))
        old = self._components
        if sum(old.ranks) < self._low:
            self._average_sensitivities()
            self._grow(step)
        self._settle(old)
        if sum(self._components.ranks) == self._low:
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
        if sum(self._components.ranks) == self._low:
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
        beta1, beta2 = self.beta1, self.beta2
        assert self._sensitivities is not None, "before_training() watches until the budget is reached"
        found = self._sensitivities.take()
        # A step that overflows, as with fp16's loss scale, changes nothing.
        found = found.where(found.isfinite(), self._average)
        self._average = beta1 * self._average + (1 - beta1) * found
        self._uncertainty = beta2 * self._uncertainty + (1 - beta2) * (found - self._average).abs()

    def _grow(self, step: int) -> None:
        """Promote components up to the budget at the sites with the highest scores."""
        ranks, budget = self._components.ranks, self.most_ranks(step)
        if budget == sum(ranks):
            return
        scores = self._average * self._uncertainty
        total = budget - sum(ranks)
        gains = from_first(lambda: growth(scores.tolist(), ranks, total=total, count=self._gain, max_r=self._max_r))
        reserve = 0 if budget == self._low else self._gain
        self._components = self._components.grown(gains, step=step, reserve=reserve)
        # Weight decay has shrunk the unused components, so new ones are initialised again.
        generator = torch.Generator().manual_seed(self.seed + step)
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
            if self.alpha == "keep":
                layer.ranknum["default"].fill_(rank)

    def _pace(self, since: Tensor, step: int) -> Tensor:
        """Return the share of the optimizer's step that each component takes; those of the start take all of it."""
        return torch.where(since > 0, ((step - since) / (self.restart or self._every)).clamp(max=1), 1.0)


build = IncreLora


class Sensitivities:
    """Each site's sensitivity, added up over backward passes until it is taken.

    Several processes average ∂L/∂ΔW within a backward pass, so each site must be in it on all of them.

    Args:
        layers: The sites' adapters by name; watched until :meth:`stop`.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._expected = dict.fromkeys(layers, 0)
        self._compared = False
        self._handles = [
            handle
            for name, layer in layers.items()
            for handle in watch_backward(layer, partial(self._add, name), partial(self._expect, name))
        ]

    def take(self) -> Tensor:
        """Return the sums (sites,) and start anew; sites without a backward pass have 0."""
        found = torch.stack([self._sums.get(name, torch.zeros(())).cpu() for name in self._layers])
        self._sums, self._expected, self._compared = {}, dict.fromkeys(self._layers, 0), False
        return found

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _expect(self, name: str) -> None:
        self._expected[name] += 1

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if process_count() > 1 and not self._compared:  # else a process would wait for what no other sends
            advice = "train in one process a model that leaves out layers or experts at some rows"
            require_agreement(str(self._expected), "the set of sites that a batch runs through", advice)
        self._expected[name] -= 1
        self._compared = any(self._expected.values())
        self._sums[name] = self._sums.get(name, 0) + sensitivity(self._layers[name], x, gradient)


def watch_backward(
    layer: Any, call: Callable[[Tensor, Tensor], None], announce: Callable[[], None] | None = None
) -> list[RemovableHandle]:
    """Make each backward pass call ``call(x, g)`` with A's input and the gradient of the layer's output.

    This keeps no tensor longer: autograd holds x for A's gradient until then.

    Args:
        layer: The site's adapter.
        call: What is called.
        announce: Called in each forward pass that may be followed by a backward pass.
    """
    given: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        given.append(output.detach())

    def attach(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        x = given.pop()
        if output.requires_grad:
            output.register_hook(partial(call, x))
            if announce is not None:
                announce()

    return [layer.lora_dropout["default"].register_forward_hook(keep), layer.register_forward_hook(attach)]


@torch.no_grad()
def sensitivity(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """Return I = Σ|ΔW∘G| / √(d_out·d_in) with G = gᵀ·x, the mean over the processes, computed in blocks of rows.

    Args:
        layer: The site's adapter.
        x: A's input, (..., in).
        gradient: g of the layer's output, (..., out).
    """
    a, b, e = (matrix["default"].detach() for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    x, gradient = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
    scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
    right, size = (scale * e * a).float(), max(1, _ENTRIES // x.shape[1])
    total = torch.zeros((), device=x.device)
    for left, g in zip(b.float().split(size), gradient.split(size, dim=1), strict=True):
        total += ((left @ right) * average(g.T @ x)).abs().sum()
    return total / (x.shape[1] * gradient.shape[1]) ** 0.5


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """Return the gradient of ‖R·Rᵀ − I‖_F with respect to R (r, d): 2·(R·Rᵀ − I)·R / ‖R·Rᵀ − I‖_F.

    Example:
        >>> orthogonality_gradient(torch.tensor([[2.0, 0.0]]))
        tensor([[4., 0.]])
    """
    rest = rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    return 2 * rest @ rows / rest.norm().clamp(min=1e-12)


def _rows(layer: Any) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Return A (max_r, in), Bᵀ (max_r, out) and e (max_r, 1), a row for each component, each with its gradient."""
    a, b, e = (matrix["default"] for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    return (a.detach(), a.grad), (b.detach().T, None if b.grad is None else b.grad.T), (e.detach(), e.grad)


def _require_growth(r: int, max_r: int) -> None:
    if r < 2:
        raise OptionError(f"r={r} leaves nothing to grow, every site starts with one rank; give r of at least 2")
    if max_r <= r:
        raise OptionError(f"max_r={max_r} is not allowed: give more than r={r}, or no site can have more than another")
