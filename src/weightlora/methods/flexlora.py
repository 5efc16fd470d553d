"""FlexLoRA (Bai et al. 2024, arXiv:2402.11505): federated LoRA with several ranks, its clients run one after another.

Each client trains LoRA of its own rank. The server averages the clients' full updates, W = Σ_c w_c·s·B_c·A_c, and sends
each client the best approximation of its rank, A = V_rᵀ and B = U_r·Σ_r/s of W's SVD.
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
from weightlora.methods.base import AttachedPlan, Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.methods.common.export import Factors, become_stock, factors_plan
from weightlora.methods.common.triplets import require_steps, triplet_plan
from weightlora.model.distributed import from_first
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites, require_uniform
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


def build(*, clients: int = 4, ranks: Sequence[int] | int | None = None, rounds: int = 4) -> Method:
    """Return the method.

    Args:
        clients: Clients; they train one after the other in each round.
        ranks: One for each client, or one for all. None: r/2, r, r, 3r/2 in rotation. The paper has 8, 30 and 200.
        rounds: The most averages of the server. Each client has at least one step in a round. The paper has 50.

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
    """FlexLoRA as a method, and the mover that its callback calls: the server and the active client."""

    _plan = AttachedPlan()

    def __init__(self, clients: int, ranks: Sequence[int] | None, rounds: int) -> None:
        self._clients, self._asked, self._rounds = clients, ranks, rounds
        self._callback = _FreshOptimizer(self)
        self._moving = False
        self.turn = 0
        """Finished turns; in a turn one client trains."""

    @property
    def plan(self) -> AdapterPlan:
        """The largest client's rank before the training, then the active client's."""
        if not self._moving:
            return self._plan
        return replace(self._plan, entries=tuple(replace(e, r=self._rank(self.turn)) for e in self._plan.entries))

    def budget(self, step: int) -> int:
        """Return the ranks of the client after ``step``; they may exceed plain LoRA's until the last step."""
        return self._sites * (self._max_r if step == 0 else self._rank(bisect_right(self._ends, step)))

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put LoRA of the largest client's rank on all sites, cut to the first client's."""
        require_uniform("flexlora", lora)
        sites = find_sites(model, lora).sites
        self._ranks = rotated_ranks(lora.r, self._clients) if self._asked is None else list(self._asked)
        self._ends = turn_ends(total_steps, clients=self._clients, rounds=self._rounds)
        self._total, self._sites, self._r = total_steps, len(sites), lora.r
        self._max_r = max(lora.r, *self._ranks)
        self._scale = lora.lora_alpha / lora.r
        record = {"clients": self._clients, "ranks": self._ranks, "rounds": len(self._ends) // self._clients}
        plan = triplet_plan(model, lora, sites, self._max_r, rule="flexlora", options=record)
        self._plan = replace(plan, entries=tuple(replace(e, alpha=self._scale * self._max_r) for e in plan.entries))
        attached = self._plan.attach(model)
        self._layers: dict[str, Any] = dict(lora_layers(attached))
        self._heads = {n: p for n, p in attached.named_parameters() if p.requires_grad and ".lora_" not in n}
        self._moving, self.turn = False, 0
        self._handed = {**self._adapters(self._max_r), **{n: _wide(p) for n, p in self._heads.items()}}
        self._round: dict[str, Tensor] = {}
        self._cut()
        tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([tuner, tuner.model], "flexlora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that ends turns."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the server's last average, of rank r at each site.

        Raises:
            SelectionError: The last turn is not finished.
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
        """Check that the training takes the steps that the turns were made for.

        Raises:
            OptionError: The training takes more or fewer.
        """
        require_steps("flexlora", self._total, total_steps)
        self._moving = True
        self._remove_watch()

    def before_step(self, step: int) -> None:
        """Do nothing: where A's row and B's column are both zero, neither has a gradient."""

    def after_step(self, step: int) -> None:
        """Collect the client's update at the end of a turn, average at the end of a round, start the next client."""
        self._cut()
        if step < self._ends[self.turn]:
            return
        self._collect()
        self.turn += 1
        if self.turn % self._clients == 0:
            self._handed, self._round = from_first(self._averaged), {}
        self._hand_out()

    def state(self) -> dict[str, Tensor]:
        """Return the finished turns, the server's last average, and the updates collected in this round."""
        kinds = {"handed": self._handed, "round": self._round}
        named = {f"{kind} {name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}
        return {"turn": torch.tensor(self.turn), **named}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set them."""
        self.turn = int(state["turn"])
        self._handed, self._round = (
            {key.removeprefix(kind): tensor for key, tensor in state.items() if key.startswith(kind)}
            for kind in ("handed ", "round ")
        )

    def _rank(self, turn: int) -> int:
        """Return the rank of the client that follows ``turn`` turns; r after the last."""
        return self._r if turn == len(self._ends) else self._ranks[turn % self._clients]

    def _collect(self) -> None:
        """Add the client's adapters, weighted by its share of the round's steps, to this round's updates."""
        starts = (0, *self._ends)
        first = self.turn - self.turn % self._clients
        weight = (starts[self.turn + 1] - starts[self.turn]) / (starts[first + self._clients] - starts[first])
        for name, tensor in self._adapters(self._rank(self.turn)).items():
            # Σ_c w_c·B_c·A_c is one product: the weighted B's side by side times the A's stacked.
            is_b = name.endswith(_B)
            parts = [*([self._round[name]] if name in self._round else []), weight * tensor if is_b else tensor]
            self._round[name] = torch.cat(parts, dim=1 if is_b else 0)
        for name, parameter in self._heads.items():
            self._round[name] = self._round.get(name, 0) + weight * _wide(parameter)

    def _averaged(self) -> dict[str, Tensor]:
        """Return the average of the collected updates, computed on the CPU; heads are averaged as they are."""
        handed = {name: self._round[name] for name in self._heads}
        for name in self._layers:
            a, b = truncated(self._round[name + _A], self._round[name + _B], self._max_r)
            handed |= {name + _A: a, name + _B: b}
        return handed

    @torch.no_grad()
    def _hand_out(self) -> None:
        """Give the next client the server's average."""
        for name, layer in self._layers.items():
            for matrix, kind in zip(_matrices(layer), (_A, _B), strict=True):
                matrix.copy_(self._handed[name + kind])
        for name, parameter in self._heads.items():
            parameter.copy_(self._handed[name])
        self._cut()

    @torch.no_grad()
    def _cut(self) -> None:
        """Zero what is beyond the active client's rank; an optimizer's old moments may move it."""
        rank = self._rank(self.turn)
        for layer in self._layers.values():
            a, b = _matrices(layer)
            a[rank:] = 0
            b[:, rank:] = 0

    def _adapters(self, rank: int) -> dict[str, Tensor]:
        """Return copies of the first ``rank`` components of all sites."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            a, b = _matrices(layer)
            found |= {name + _A: _wide(a[:rank]), name + _B: _wide(b[:, :rank])}
        return found


class _FreshOptimizer(MoverCallback):
    """Clears the optimizer's state at the start of each turn, as a client's own optimizer would start."""

    def __init__(self, mover: FlexLora) -> None:
        super().__init__(mover)
        self._server = mover

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the method act, and clear the optimizer's state after a turn."""
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
    """Return the last step of each turn; lengths differ by at most one step, and with few steps there are fewer rounds.

    Raises:
        OptionError: There are fewer steps than clients.

    Example:
        >>> turn_ends(10, clients=2, rounds=2), turn_ends(5, clients=2, rounds=4)
        ((2, 5, 7, 10), (1, 2, 3, 5))
    """
    if total_steps < clients:
        raise OptionError(f"{total_steps} steps are fewer than clients={clients}; train longer or lower clients")
    turns = clients * min(rounds, total_steps // clients)
    return tuple((turn + 1) * total_steps // turns for turn in range(turns))


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) = V_rankᵀ and B (out, rank) = U_rank·Σ_rank of the SVD of b·a, filled up with zeros.

    After a QR of both factors, the SVD is that of a matrix of their inner size; no matrix of size out × in is needed.

    Args:
        a: (R, in), R of any size.
        b: (out, R).
        rank: Components to keep, the strongest first.

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
    """Return a copy on the CPU in fp32 or wider."""
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)
