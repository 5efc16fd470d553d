"""FlexLoRA (Bai et al. 2024, arXiv:2402.11505): federated LoRA with several ranks, its clients run one after another.

Each client trains LoRA of its own rank. The server averages the clients' full updates, W = Σ_c w_c·s·B_c·A_c, and sends
each client the best approximation of its rank, A = V_rᵀ and B = U_r·Σ_r/s of W's SVD.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError
from weightlora.methods.base import Start
from weightlora.methods.families.moving import Attached, MoverCallback, MovingMethod, packed, unpacked, wide_lora
from weightlora.model.distributed import from_first
from weightlora.validation import Count, Whole

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True, eq=False)
class FlexLora(MovingMethod):
    """FlexLoRA: the server and the active client. Until the last step its ranks may exceed plain LoRA's.

    Args:
        clients: Clients; they train one after the other in each round.
        ranks: One for each client, or one for all. None: r/2, r, r, 3r/2 in rotation. The paper has 8, 30 and 200.
        rounds: The most averages of the server. Each client has at least one step in a round. The paper has 50.

    Raises:
        OptionError: There is not one rank of at least 1 for each client.
    """

    clients: Count = 4
    ranks: Sequence[Whole] | Whole | None = None
    rounds: Count = 4
    name = "flexlora"
    turn = 0
    """Finished turns; in a turn one client trains."""

    def __post_init__(self) -> None:
        ranks = self._asked = [self.ranks] * self.clients if isinstance(self.ranks, int) else self.ranks
        if ranks is not None and (len(ranks) != self.clients or min(ranks) < 1):
            raise OptionError(
                f"ranks={list(ranks)} is not allowed: give one of at least 1 for each of clients={self.clients}"
            )

    def most_ranks(self, step: int) -> int:
        """Return the ranks of the client after ``step``."""
        return self._sites * (self._max_r if step == 0 else self._rank(bisect_right(self._ends, step)))

    def _start(self, start: Start) -> Attached:
        """Put LoRA of the largest client's rank on all sites, cut to the first client's."""
        r = start.lora.r
        self._ranks = rotated_ranks(r, self.clients) if self._asked is None else list(self._asked)
        self._ends = turn_ends(self._total, clients=self.clients, rounds=self.rounds)
        self._sites, self._r, self._max_r = len(start.sites), r, max(r, *self._ranks)
        record = {"clients": self.clients, "ranks": self._ranks, "rounds": len(self._ends) // self.clients}
        plan, attached = wide_lora(self.name, start, self._max_r, record)
        self._heads = {n: p for n, p in attached.named_parameters() if p.requires_grad and ".lora_" not in n}
        return plan, attached

    def _ready(self) -> None:
        self.turn = 0
        self._handed = {**self._adapters(self._max_r), **{n: _wide(p) for n, p in self._heads.items()}}
        self._round: dict[str, Tensor] = {}
        self._cut()

    def _in_force(self) -> Mapping[str, Tensor]:
        """Return the active client's components, after the last turn those of plain LoRA."""
        return dict.fromkeys(self._layers, torch.arange(self._max_r) < self._rank(self.turn))

    def _missing(self, ranks: int) -> str | None:  # noqa: ARG002 - the turns tell
        return None if self.turn == len(self._ends) else f"has finished {self.turn} of {len(self._ends)} turns"

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that ends turns."""
        return [_FreshOptimizer(self)]

    def after_step(self, step: int) -> None:
        """Collect the client's update at the end of a turn, average at the end of a round, start the next client.

        Nothing is to be done before a step: where A's row and B's column are both zero, neither has a gradient.
        """
        self._cut()
        if step < self._ends[self.turn]:
            return
        self._collect()
        self.turn += 1
        if self.turn % self.clients == 0:
            self._handed, self._round = from_first(self._averaged), {}
        self._hand_out()

    def state(self) -> dict[str, Tensor]:
        """Return the finished turns, the server's last average, and the updates collected in this round."""
        return {"turn": torch.tensor(self.turn), **packed(handed=self._handed, round=self._round)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set them."""
        self.turn = int(state["turn"])
        tensors = {key: tensor for key, tensor in state.items() if key != "turn"}
        self._handed, self._round = unpacked(tensors, "handed", "round")

    def _rank(self, turn: int) -> int:
        """Return the rank of the client that follows ``turn`` turns; r after the last."""
        return self._r if turn == len(self._ends) else self._ranks[turn % self.clients]

    def _collect(self) -> None:
        """Add the client's adapters, weighted by its share of the round's steps, to this round's updates."""
        starts = (0, *self._ends)
        first = self.turn - self.turn % self.clients
        weight = (starts[self.turn + 1] - starts[self.turn]) / (starts[first + self.clients] - starts[first])
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


build = FlexLora


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
