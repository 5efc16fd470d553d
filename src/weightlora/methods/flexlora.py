"""FlexLoRA (Bai et al. 2024, arXiv:2402.11505), its clients one after the other on one machine.

Clients train LoRA of ranks of their own; the server averages their whole updates, W = Σ_c w_c·s·B_c·A_c, and hands the
best approximation of its rank, A = V_rᵀ and B = U_r·Σ_r/s of W's SVD, to each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.methods.common.export import Factors, become_stock, factors_plan
from weightlora.methods.common.triplets import require_steps, triplet_plan
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites, require_uniform
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


def build(*, clients: int = 4, ranks: Sequence[int] | int | None = None, rounds: int = 4) -> Method:
    """Return the method.

    Args:
        clients: C, which train one after the other in each round.
        ranks: One a client, or one for all; None stands for r/2, r, r, 3r/2 in rotation. The paper has 8, 30 and 200.
        rounds: How often the server averages, at most; each client has at least one step in each. The paper has 50.

    Raises:
        OptionError: An argument is out of its range.
    """
    for name, value in (("clients", clients), ("rounds", rounds)):
        if value < 1:
            raise OptionError(f"{name}={value} is not allowed: give at least 1")
    ranks = [ranks] * clients if isinstance(ranks, int) else ranks
    if ranks is not None and (len(ranks) != clients or min(ranks) < 1):
        raise OptionError(f"ranks={list(ranks)} is not allowed: give one of at least 1 for each of clients={clients}")
    return FlexLora(clients, ranks, rounds)


class FlexLora:
    """The method, and its own mover: the server, and whichever client has its turn."""

    def __init__(self, clients: int, ranks: Sequence[int] | None, rounds: int) -> None:
        self._clients, self._asked, self._rounds = clients, ranks, rounds
        self._callback = _FreshOptimizer(self)
        self._moving = False
        self.turn = 0
        """Turns that are over."""

    @property
    def plan(self) -> AdapterPlan:
        """Room for the largest client before the training, then the ranks that the present one holds."""
        if not self._moving:
            return self._plan
        return replace(self._plan, entries=tuple(replace(e, r=self._rank(self.turn)) for e in self._plan.entries))

    def budget(self, step: int) -> int:
        """The ranks of the client whose turn follows on ``step``; may exceed plain LoRA's until the last step."""
        return self._sites * (self._room if step == 0 else self._rank(bisect_right(self._ends, step)))

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put plain LoRA on all sites, with room for the largest client, and hand the first client its rank."""
        require_uniform("flexlora", lora)
        sites = find_sites(model, lora).sites
        self._ranks = rotated_ranks(lora.r, self._clients) if self._asked is None else list(self._asked)
        self._ends = turn_ends(total_steps, clients=self._clients, rounds=self._rounds)
        self._total, self._sites, self._r = total_steps, len(sites), lora.r
        self._room = max(lora.r, *self._ranks)
        self._scale = lora.lora_alpha / lora.r
        record = {"clients": self._clients, "ranks": self._ranks, "rounds": len(self._ends) // self._clients}
        plan = triplet_plan(model, lora, sites, self._room, rule="flexlora", options=record)
        self._plan = replace(plan, entries=tuple(replace(e, alpha=self._scale * self._room) for e in plan.entries))
        attached = self._plan.attach(model)
        self._layers: dict[str, Any] = dict(lora_layers(attached))
        self._heads = {n: p for n, p in attached.named_parameters() if p.requires_grad and ".lora_" not in n}
        self._moving, self.turn = False, 0
        self._handed = {**self._adapters(self._room), **{n: _wide(p) for n, p in self._heads.items()}}
        self._round: dict[str, Tensor] = {}
        self._cut()
        tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([tuner, tuner.model], "flexlora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """What ends a turn."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the server's last average, of rank r at each site.

        Raises:
            SelectionError: The last turn is not over.
        """
        if self.turn < len(self._ends):
            raise SelectionError(
                f"flexlora has finished {self.turn} of {len(self._ends)} turns: it did not run to the end; give the "
                "trainer callbacks=method.callbacks(), and train all of the steps"
            )
        layers: dict[str, Any] = dict(lora_layers(model))
        factors = {
            name: Factors(a.detach()[: self._r], b.detach()[:, : self._r], self._scale)
            for name, layer in layers.items()
            for a, b in [_matrices(layer)]
        }
        self._plan, self._moving = factors_plan(self._plan, factors), False
        self._remove_watch()
        return become_stock(model, self._plan, factors)

    def begin(self, total_steps: int) -> None:
        """The turns were dealt for a number of steps, and no other.

        Raises:
            OptionError: The training takes more or fewer.
        """
        require_steps("flexlora", self._total, total_steps)
        self._moving = True
        self._remove_watch()

    def before_step(self, step: int) -> None:
        """Nothing: where A's row and B's column are both zero, neither has a gradient."""

    def after_step(self, step: int) -> None:
        """At the end of a turn take the client's work, at that of a round average it; then the next client begins."""
        self._cut()
        if step < self._ends[self.turn]:
            return
        self._collect()
        self.turn += 1
        if self.turn % self._clients == 0:
            self._average()
        self._hand_out()

    def state(self) -> dict[str, Tensor]:
        """Turns that are over, what the server handed out last, and what came back in this round."""
        kinds = {"handed": self._handed, "round": self._round}
        named = {f"{kind} {name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}
        return {"turn": torch.tensor(self.turn), **named}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them."""
        self.turn = int(state["turn"])
        self._handed, self._round = (
            {key.removeprefix(kind): tensor for key, tensor in state.items() if key.startswith(kind)}
            for kind in ("handed ", "round ")
        )

    def _rank(self, turn: int) -> int:
        """Of the client that is next after ``turn`` turns; r when all are over."""
        return self._r if turn == len(self._ends) else self._ranks[turn % self._clients]

    def _collect(self) -> None:
        """Add the client's adapters, weighted by its share of the round's steps, to what came back so far."""
        starts = (0, *self._ends)
        first = self.turn - self.turn % self._clients
        weight = (starts[self.turn + 1] - starts[self.turn]) / (starts[first + self._clients] - starts[first])
        for name, tensor in self._adapters(self._rank(self.turn)).items():
            # Σ_c w_c·B_c·A_c is one product of A's above each other and of weighted B's side by side.
            is_b = name.endswith(_B)
            parts = [*([self._round[name]] if name in self._round else []), weight * tensor if is_b else tensor]
            self._round[name] = torch.cat(parts, dim=1 if is_b else 0)
        for name, parameter in self._heads.items():
            self._round[name] = self._round.get(name, 0) + weight * _wide(parameter)

    def _average(self) -> None:
        """The server's work, on the CPU; heads are averaged as they are."""
        handed = {name: self._round[name] for name in self._heads}
        for name in self._layers:
            a, b = truncated(self._round[name + _A], self._round[name + _B], self._room)
            handed |= {name + _A: a, name + _B: b}
        self._handed, self._round = handed, {}

    @torch.no_grad()
    def _hand_out(self) -> None:
        """Let the next client begin where the server stands."""
        for name, layer in self._layers.items():
            for matrix, kind in zip(_matrices(layer), (_A, _B), strict=True):
                matrix.copy_(self._handed[name + kind])
        for name, parameter in self._heads.items():
            parameter.copy_(self._handed[name])
        self._cut()

    @torch.no_grad()
    def _cut(self) -> None:
        """Zero what is beyond the present client's rank, also where an optimizer's old moments have moved it."""
        rank = self._rank(self.turn)
        for layer in self._layers.values():
            a, b = _matrices(layer)
            a[rank:] = 0
            b[:, rank:] = 0

    def _adapters(self, rank: int) -> dict[str, Tensor]:
        """The first ``rank`` components of all sites."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            a, b = _matrices(layer)
            found |= {name + _A: _wide(a[:rank]), name + _B: _wide(b[:, :rank])}
        return found


class _FreshOptimizer(MoverCallback):
    """Each turn begins with an optimizer that remembers nothing, as a client's own would."""

    def __init__(self, mover: FlexLora) -> None:
        super().__init__(mover)
        self._server = mover

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the method act."""
        turn = self._server.turn
        super().on_optimizer_step(args, state, control, **kwargs)
        if self._server.turn != turn:
            kwargs["optimizer"].state.clear()


#: Endings of the names in the server's state.
_A, _B = " A", " B"


def rotated_ranks(r: int, clients: int) -> list[int]:
    """Return r/2, r, r, 3r/2 in rotation, whose mean over four clients is r.

    Example:
        >>> rotated_ranks(8, 5), rotated_ranks(1, 4)
        ([4, 8, 8, 12, 4], [1, 1, 1, 1])
    """
    low = max(1, r // 2)
    return [(low, r, r, 2 * r - low)[client % 4] for client in range(clients)]


def turn_ends(total_steps: int, *, clients: int, rounds: int) -> tuple[int, ...]:
    """Return the last step of each turn, which differ in length by one step at most; fewer rounds where steps are few.

    Raises:
        OptionError: There are fewer steps than clients.

    Example:
        >>> turn_ends(10, clients=2, rounds=2), turn_ends(5, clients=2, rounds=4)
        ((2, 5, 7, 10), (1, 2, 3, 5))
    """
    if total_steps < clients:
        raise OptionError(
            f"{total_steps} steps give clients={clients} less than one each; train longer or lower clients"
        )
    turns = clients * min(rounds, total_steps // clients)
    return tuple((turn + 1) * total_steps // turns for turn in range(turns))


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) = V_rankᵀ and B (out, rank) = U_rank·Σ_rank of the SVD of b·a; zeros where there are fewer.

    QR of both factors leaves the SVD of a matrix of their inner size: nothing of size out × in is made.

    Args:
        a: (R, in), R of any size.
        b: (out, R).
        rank: Components that are kept, the strongest first.

    Example:
        >>> a, b = truncated(torch.eye(2), torch.diag(torch.tensor([1.0, 3.0])), 1)
        >>> (b @ a).round(decimals=4).abs()
        tensor([[0., 0.],
                [0., 3.]])
    """
    (rows, left), (columns, right) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, sizes, v = torch.linalg.svd(left @ right.T, full_matrices=False)
    new_a, new_b = (v @ columns.T)[:rank], (rows @ (u * sizes))[:, :rank]
    missing = rank - len(new_a)
    return torch.nn.functional.pad(new_a, (0, 0, 0, missing)), torch.nn.functional.pad(new_b, (0, missing))


def _matrices(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _wide(tensor: Tensor) -> Tensor:
    """A copy on the CPU in fp32 or wider."""
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)
