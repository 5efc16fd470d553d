"""The rule of the paper: gates trained by stochastic iterative hard thresholding (section 2, Appendix B).

Every vector is in the order of the sites' sorted names, so that ties are broken by name.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from weightlora.model.gates import gated
from weightlora.selection.rules.base import Rule, Scores, jackknife_of_rows, require
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class StoIHT(Rule):
    """Train A, B, the head and one gate ω per site; after each step keep the gates that fit the budget (the paper).

    The paper's algorithm is ``StoIHT(head_steps=0)``, in short ``rule="paper"``.

    Args:
        gate_lr: η, the step size of ω in units of ω per unit of gradient. The paper gives none; the authors' code has
            5.0.
        threshold_every: Steps between thresholds: 1 is the paper; a number of at least T thresholds once, at the end.
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> StoIHT(threshold_every=20)
        StoIHT(head_steps=None, gate_lr=5.0, threshold_every=20)
    """

    gate_lr: float = 5.0
    threshold_every: int = 1
    knobs: ClassVar[tuple[str, ...]] = ("gate_lr", "steps")
    trains_adapters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        every: object = self.threshold_every
        whole = isinstance(every, int) and every >= 1  # pyright: ignore[reportUnnecessaryIsInstance]
        require(whole, f"threshold_every={every!r}", "a whole number, 1 (the paper) or more")
        require(0 < self.gate_lr < float("inf"), f"gate_lr={self.gate_lr}", "a positive number")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the gates after the last step; ω of a dropped site is 0."""
        adapters = [*stage.parameters("lora_A"), *stage.parameters("lora_B")]
        trained = [*adapters, *stage.head]
        let_train(stage, trained)
        optimizer = stage.optimizer(adapters, stage.learning_rate)
        count = steps[-1]
        history: list[tuple[float, ...]] = []
        gradients: list[Tensor] = []
        with gated(stage.layers) as gates:
            for step in range(1, count + 1):
                stage.backward("scoring", step, [*trained, *gates.leaves])
                gradients.append(gates.gradient)
                cut = step % self.threshold_every == 0 or step == count
                limit = budget if cut else None
                omega = stoiht_step(gates.omega, gradients[-1], gate_lr=self.gate_lr, budget=limit)
                optimizer.step()
                gates.write(omega)
                optimizer.zero_grad()
                gates.clear()
                history.append(tuple(omega.tolist()))
        final = history[-1]
        seen = torch.stack(gradients)
        # ω after T steps on some of the batches, had no gate been dropped
        known = jackknife_of_rows(seen, lambda some: 1 - self.gate_lr * count * some.mean(0))
        moved = tuple((seen != 0).any(0).tolist())
        sizes = tuple(map(abs, final))
        found = Scores(tuple(history), moved, sizes, errors=known.errors, halves=known.halves, gates=final)
        yield count, found


def hard_threshold(omega: Tensor, budget: Chooser) -> Tensor:
    """Return H_K(ω): the entries that the budget can pay for, in descending order of |ω|, and zero elsewhere.

    Args:
        omega: The gates, shape (n,), in the order of the sites' names.
        budget: How many sites, or how many parameters, may stay.

    Example:
        >>> import torch
        >>> from weightlora.plan.budget import Budget
        >>> hard_threshold(torch.tensor([0.5, -2.0, 1.0]), Budget.of_count(2, n=3))
        tensor([ 0., -2.,  1.])
    """
    # The paper's Appendix B. The authors' code keeps the largest ω, which differs where one turns negative.
    kept = omega.new_zeros(omega.shape)
    chosen = budget.choose(omega.abs().tolist())
    kept[chosen] = omega[chosen]
    return kept


def stoiht_step(omega: Tensor, gradient: Tensor, *, gate_lr: float, budget: Chooser | None) -> Tensor:
    """Return the gates after one step: H_K(ω − η·∂L/∂ω), or the plain gradient step where ``budget`` is None.

    An all-zero gradient changes nothing: with B = 0 the first one is exactly zero, and a threshold on equal gates
    would let their order decide.

    Args:
        omega: The gates, shape (n,).
        gradient: ∂L/∂ω, shape (n,).
        gate_lr: The step size η, in units of ω per unit of gradient. The paper gives none; the authors' code has 5.0.
        budget: What may stay after the step; None in the steps that only gather.

    Example:
        >>> import torch
        >>> from weightlora.plan.budget import Budget
        >>> omega = torch.ones(3)
        >>> stoiht_step(omega, torch.tensor([0.1, 0.0, -0.1]), gate_lr=5.0, budget=Budget.of_count(1, n=3))
        tensor([0.0000, 0.0000, 1.5000])
        >>> stoiht_step(omega, torch.zeros(3), gate_lr=5.0, budget=Budget.of_count(1, n=3))
        tensor([1., 1., 1.])
    """
    if not bool(gradient.any()):
        return omega.clone()
    stepped = omega - gate_lr * gradient
    return stepped if budget is None else hard_threshold(stepped, budget)
