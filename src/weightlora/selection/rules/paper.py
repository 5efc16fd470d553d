"""The rule of the paper: gates trained by stochastic iterative hard thresholding (section 2, Appendix B).

``examples/weightlora_from_scratch.py`` says the same in plain PyTorch. Every vector is in the order of the sites'
sorted names, so that ties are broken by name.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

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
    """Train A, B, the head and one gate ω per site; after each step keep the gates that fit the budget.

    The paper minimises alternately: ω follows the gradient of the loss at the A and B that were just stepped, on the
    same batch (Appendix B, F(ω)). The authors' code steps all of them by one gradient, ``order="joint"``, in half of
    the time; its first gradient of ω is exactly zero.

    Args:
        gate_lr: η, the step size of ω in units of ω per unit of gradient. The paper gives none; the authors' code has
            5.0.
        order: ``"alternating"`` (the paper) or ``"joint"`` (the authors' code).
        threshold_every: Steps between thresholds. 1 is Appendix B, where a dropped adapter can come back, but trains
            no further while its gate is 0. That contradicts section 2, where all adapters are active until T: a number
            of at least T thresholds once, at the end.
        head_steps: Steps in which a new head is trained alone before. The paper has none.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> StoIHT(threshold_every=20)
        StoIHT(head_steps=0, gate_lr=5.0, order='alternating', threshold_every=20)
    """

    gate_lr: float = 5.0
    order: Literal["alternating", "joint"] = "alternating"
    threshold_every: int = 1
    head_steps: int | None = field(default=0, kw_only=True)
    knobs: ClassVar[tuple[str, ...]] = ("gate_lr", "steps")
    trains_adapters: ClassVar[bool] = True
    least_steps: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        every: object = self.threshold_every
        whole = isinstance(every, int) and every >= 1  # pyright: ignore[reportUnnecessaryIsInstance]
        require(whole, f"threshold_every={every!r}", "a whole number, 1 (the paper) or more")
        require(0 < self.gate_lr < float("inf"), f"gate_lr={self.gate_lr}", "a positive number")
        require(self.order in ("alternating", "joint"), f"order={self.order!r}", "'alternating' (the paper) or 'joint'")

    def passes(self, steps: Sequence[int]) -> int:
        """Return how many times the model runs on a batch: twice in the paper's order."""
        return self.batches(steps) * (2 if self.order == "alternating" else 1)

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the gates after the last step; ω of a dropped site is 0."""
        adapters = [*stage.parameters("lora_A"), *stage.parameters("lora_B")]
        trained = [*adapters, *stage.head]
        let_train(stage, trained)
        update = stage.optimizer_step(adapters)
        count = steps[-1]
        history: list[tuple[float, ...]] = []
        gradients: list[Tensor] = []
        with gated(stage.layers) as gates:
            watched = [*trained, *gates.leaves]
            for step, batch in enumerate(stage.take(count), start=1):
                stage.backward("scoring", step, watched, batch)
                if self.order == "alternating":
                    update.step()
                    gates.clear()
                    stage.backward("scoring", step, watched, batch)
                gradients.append(gates.gradient)
                if self.order == "joint":
                    update.step()
                update.optimizer.zero_grad()
                gates.clear()
                cut = step % self.threshold_every == 0 or step == count
                limit = budget if cut else None
                omega = stoiht_step(gates.omega, gradients[-1], gate_lr=self.gate_lr, budget=limit)
                gates.write(omega)
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

    An all-zero gradient changes nothing: a threshold on equal gates would let their order decide. It occurs while
    B = 0: in the first step of ``order="joint"``, and where a learning rate's warm-up begins at 0.

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
