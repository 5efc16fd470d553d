"""ALoRA (Liu et al. 2024, arXiv:2403.16187; not PEFT's aLoRA): moves ranks away from where they contribute least.

In a few rounds the contribution of every rank j is measured on held-out rows, without it and with it alone:
IS(j) = S(M) − S(M without j) + S(M with only j), with S = −loss. The lowest ranks are removed, and the sites that lost
none get as many new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import Start
from weightlora.methods.families.moving import Attached, MovingMethod, growth, wide_lora
from weightlora.model.distributed import average, from_first, process_count, require_agreement
from weightlora.model.restore import evaluated
from weightlora.selection.batches import Loss, held_out, in_parts, model_loss, rows_of
from weightlora.validation import Count, Share

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True, eq=False)
class ALora(MovingMethod):
    """ALoRA.

    Args:
        max_r: Largest rank of a site. None: 1.5·r, rounded up.
        rounds: How often ranks are moved.
        count: Ranks moved in a round. None: as many as there are sites.
        begin: Share of the training before the first round.
        interval: Steps between rounds. None: a fortieth of the training.
        probe_rows: Rows that a rank is measured on; whole batches are held out until there are as many.
        seed: Decides the initial weights of new ranks.
        loss_fn: As in :func:`weightlora.select`.
    """

    max_r: Count | None = None
    rounds: Count = 8
    count: Count | None = None
    begin: Share = 0.1
    interval: Count | None = None
    probe_rows: Count = 32
    seed: int = 0
    loss_fn: Loss | None = None
    name = "alora"

    def _start(self, start: Start) -> Attached:
        """Put LoRA of rank ``max_r`` on all sites, of which r ranks are used, and hold rows out."""
        r, sites = start.lora.r, len(start.sites)
        max_r = math.ceil(1.5 * r) if self.max_r is None else self.max_r
        if max_r <= r:
            raise OptionError(f"max_r={max_r} is not allowed: give more than r={r}, or no site can gain a rank")
        self._rounds, self._moved, self._model = self._schedule(), self.count or sites, start.model
        self._held_out = _held_out(start.batches, self.probe_rows)
        self._live = torch.arange(max_r).expand(sites, -1) < r
        self._used, self._step = self._live, 0
        record = {"max_r": max_r, "rounds": self._rounds, "count": self._moved, "seed": self.seed}
        record["probe_rows"] = process_count() * sum(map(rows_of, self._held_out))
        return wide_lora(self.name, start, max_r, record)

    def _schedule(self) -> list[int]:
        """Return the steps after which ranks move; the training continues after the last."""
        first = max(1, math.ceil(round(self.begin * self._total, 6)))
        interval = self.interval or max(1, self._total // 40)
        last = first + (self.rounds - 1) * interval
        if last >= self._total:
            raise OptionError(
                f"rounds={self.rounds} every {interval} steps from step {first} on take until step {last}, and the "
                f"training has {self._total}; lower rounds, interval or begin, or train longer"
            )
        return list(range(first, last + 1, interval))

    def _in_force(self) -> Mapping[str, Tensor]:
        return dict(zip(self._layers, self._live, strict=True))

    def _missing(self, ranks: int) -> str | None:  # noqa: ARG002 - the rounds tell
        done = sum(step <= self._step for step in self._rounds)
        return None if done == len(self._rounds) else f"has had {done} of its {len(self._rounds)} rounds"

    def before_training(self, total_steps: int) -> None:
        """Mask the gradient of B's unused ranks; that of A is zero, since B is zero there.

        Raises:
            OptionError: The training takes more steps than the schedule was made for, or fewer.
        """
        super().before_training(total_steps)
        self._mask_gradients([layer.lora_B["default"].weight for layer in self._layers.values()], self._masked)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Set unused ranks to zero again, as the optimizer's momentum may move them; in a round, move ranks."""
        self._step = step
        self._zero_unused()
        if step in self._rounds:
            with evaluated(self._model):
                scores = average(contributions(list(self._layers.values()), self._live, self._loss))
            if not bool(scores[self._live].isfinite().all()):
                raise SelectionError(
                    f"step {step}: the loss of the held-out rows is not finite, so ranks cannot be compared; lower "
                    "the learning rate or check the first batches"
                )
            off, gains = from_first(partial(moves, scores, self._live, count=self._moved))
            self._move(off, gains, step)

    def state(self) -> dict[str, Tensor]:
        """Return which ranks are used, which ever were, and the last step."""
        return {"live": self._live, "used": self._used, "step": torch.tensor(self._step)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set them."""
        self._live, self._used, self._step = state["live"], state["used"], int(state["step"])

    def _masked(self, i: int, gradient: Tensor) -> Tensor:
        """Return the gradient of a site's B, zero for unused ranks."""
        return gradient * self._live[i].to(gradient)

    def _zero_unused(self) -> None:
        """Set B = 0 for unused ranks."""
        for layer, live in zip(self._layers.values(), self._live, strict=True):
            weight = layer.lora_B["default"].weight
            weight.masked_fill_(~live.to(weight.device), 0.0)

    def _loss(self) -> float:
        """Return the mean loss of the held-out rows."""
        loss_fn = self.loss_fn or model_loss
        total = 0.0
        for batch in self._held_out:
            total += rows_of(batch) * sum(float(part) for part in in_parts(self._model, batch, loss_fn))
        return total / sum(map(rows_of, self._held_out))

    def _move(self, off: Tensor, gains: Sequence[int], step: int) -> None:
        """Remove the ranks ``off`` and start new ones: A as at the start of a training, B = 0."""
        generator = torch.Generator().manual_seed(self.seed + step)
        live = self._live & ~off
        for i, (layer, gain) in enumerate(zip(self._layers.values(), gains, strict=True)):
            # Ranks that were never used come first: for the others the optimizer still has moments.
            free = torch.where(live[i], 2, self._used[i].int()).argsort(stable=True)
            new, a = free[:gain], layer.lora_A["default"].weight
            bound = a.shape[1] ** -0.5  # Kaiming with a = √5
            a[new.to(a.device)] = (bound * (2 * torch.rand(gain, a.shape[1], generator=generator) - 1)).to(a)
            live[i, new] = True
        self._live, self._used = live, self._used | live
        self._zero_unused()


build = ALora


def contributions(layers: Sequence[Any], live: Tensor, loss: Callable[[], float]) -> Tensor:
    """Return IS − S(M) of each used rank: the loss without it minus the loss with it alone, (sites, max_r).

    It is inf for unused ranks.

    Args:
        layers: The sites' adapters; they are restored.
        live: The used ranks, (sites, max_r).
        loss: Returns the loss with the adapters as they are; called twice for each rank.
    """
    matrices = [layer.lora_B["default"].weight.detach() for layer in layers]
    whole = [matrix.clone() for matrix in matrices]
    scores = torch.full(live.shape, math.inf, dtype=torch.float64)
    ranks: list[tuple[int, int]] = [(i, j) for i, j in live.nonzero().tolist()]
    try:
        for i, j in ranks:
            matrices[i][:, j] = 0
            scores[i, j] = loss()
            matrices[i][:, j] = whole[i][:, j]
        for matrix in matrices:
            matrix.zero_()
        for i, j in ranks:
            matrices[i][:, j] = whole[i][:, j]
            scores[i, j] -= loss()
            matrices[i][:, j] = 0
    finally:
        for matrix, before in zip(matrices, whole, strict=True):
            matrix.copy_(before)
    return scores


def moves(scores: Tensor, live: Tensor, *, count: int) -> tuple[Tensor, list[int]]:
    """Return which ranks are removed, (sites, max_r), and how many each site gains.

    The ``count`` lowest are removed. The sites that lose none gain as many, one at a time by falling mean score. If
    ``max_r`` does not allow so many, fewer are removed.

    Example:
        >>> scores, live = torch.tensor([[2.0, 1.0, 9.0], [4.0, 3.0, 9.0]]), torch.tensor([[True, True, False]] * 2)
        >>> moves(scores, live, count=2)  # the second site can gain one
        (tensor([[False,  True, False],
                [False, False, False]]), [0, 1])
    """
    sites, max_r = live.shape
    ranks: list[int] = live.sum(dim=1).tolist()
    means = [float(s[there].mean()) if there.any() else -math.inf for s, there in zip(scores, live, strict=True)]
    lowest = scores.where(live, math.inf).flatten().argsort(stable=True)
    for wanted in range(min(count, sum(ranks)), 0, -1):
        off = torch.zeros(live.numel(), dtype=torch.bool)
        off[lowest[:wanted]] = True
        off = off.view_as(live)
        takers = [i for i in range(sites) if not off[i].any()]
        if sum(max_r - ranks[i] for i in takers) >= wanted:
            taken = growth([means[i] for i in takers], [ranks[i] for i in takers], total=wanted, count=1, max_r=max_r)
            gains = dict(zip(takers, taken, strict=True))
            return off, [gains.get(i, 0) for i in range(sites)]
    return torch.zeros_like(live), [0] * sites


def _held_out(batches: Iterable[Any], rows: int) -> list[Any]:
    """Return this process's part of the batches that are held out, as many rows as every other has.

    Raises:
        SelectionError: There is no batch, or another process has other numbers of rows.
    """
    taken = held_out(batches, -(-rows // process_count()))
    require_agreement(str([rows_of(batch) for batch in taken]), "the number of rows that alora holds out")
    return taken
