"""Hard thresholding and the StoIHT step of the paper (section 2, Appendix B): pure functions on tensors.

Every vector stands in the order of the sites' sorted names, so that equal values are told apart by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from weightlora.cost.knapsack import CostBudget
    from weightlora.plan.budget import Budget

Threshold = Literal["magnitude", "signed"]
THRESHOLDS: tuple[str, ...] = get_args(Threshold)


def hard_threshold(omega: Tensor, budget: Budget | CostBudget, *, threshold: Threshold = "magnitude") -> Tensor:
    """Return H_K(ω): the entries that the budget can pay for, in descending order of size, and zero elsewhere.

    Args:
        omega: The gates, shape (n,), in the order of the sites' names.
        budget: How many sites, or how many parameters, may stay.
        threshold: ``"magnitude"`` keeps the largest |ω| (the paper, Appendix B), ``"signed"`` the largest ω (the
            authors' code). They agree unless an ω turns negative.

    Example:
        >>> import torch
        >>> from weightlora.plan.budget import Budget
        >>> hard_threshold(torch.tensor([0.5, -2.0, 1.0]), Budget.of_count(2, n=3))
        tensor([ 0., -2.,  1.])
        >>> hard_threshold(torch.tensor([0.5, -2.0, 1.0]), Budget.of_count(2, n=3), threshold="signed")
        tensor([0.5000, 0.0000, 1.0000])
    """
    size = omega.abs() if threshold == "magnitude" else omega
    kept = omega.new_zeros(omega.shape)
    chosen = budget.choose(size.tolist())
    kept[chosen] = omega[chosen]
    return kept


def stoiht_step(
    omega: Tensor,
    gradient: Tensor,
    *,
    gate_lr: float,
    budget: Budget | CostBudget | None,
    threshold: Threshold = "magnitude",
) -> Tensor:
    """Return the gates after one step: H_K(ω − η·∂L/∂ω), or the plain gradient step where ``budget`` is None.

    An all-zero gradient changes nothing: with B = 0 the first one is exactly zero, and a threshold on equal gates
    would let their order decide.

    Args:
        omega: The gates, shape (n,).
        gradient: ∂L/∂ω, shape (n,).
        gate_lr: The step size η, in units of ω per unit of gradient. The paper gives none; the authors' code has 5.0.
        budget: What may stay after the step; None in the steps that only gather.
        threshold: See :func:`hard_threshold`.

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
    return stepped if budget is None else hard_threshold(stepped, budget, threshold=threshold)
