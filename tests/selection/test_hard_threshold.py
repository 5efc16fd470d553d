from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightlora.plan.budget import Budget
from weightlora.selection.rules.paper import hard_threshold, stoiht_step

# Whole numbers: sums of squares are exact, and ties are common.
OMEGAS = st.lists(st.integers(-4, 4), min_size=1, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float)
)


def nearest_sparse(omega: Tensor, k: int) -> Tensor:
    """Slow reference: of all supports of size K, the one that loses least; the first of equals."""
    values = omega.tolist()
    support = max(combinations(range(len(values)), k), key=lambda kept: sum(values[i] ** 2 for i in kept))
    return torch.tensor([value if i in support else 0.0 for i, value in enumerate(values)])


@given(OMEGAS, st.data())
def test_hard_threshold_is_the_nearest_k_sparse_vector(omega, data):
    k = data.draw(st.integers(1, len(omega)))
    budget = Budget.of_count(k, n=len(omega))
    assert hard_threshold(omega, budget).equal(nearest_sparse(omega, k))


@given(OMEGAS, st.data())
def test_hard_threshold_is_idempotent_and_leaves_its_input(omega, data):
    budget = Budget.of_count(data.draw(st.integers(1, len(omega))), n=len(omega))
    before = omega.clone()
    once = hard_threshold(omega, budget)
    assert hard_threshold(once, budget).equal(once)
    assert omega.equal(before)
    assert once.data_ptr() != omega.data_ptr()


def test_a_large_negative_gate_stays():
    omega, budget = torch.tensor([0.5, -2.0]), Budget.of_count(1, n=2)
    assert hard_threshold(omega, budget).tolist() == [0.0, -2.0]


def test_equal_gates_are_told_apart_by_their_place_which_is_the_order_of_names():
    assert hard_threshold(torch.ones(5), Budget.of_count(2, n=5)).tolist() == [1, 1, 0, 0, 0]
    assert hard_threshold(torch.tensor([-1.0, 1.0]), Budget.of_count(1, n=2)).tolist() == [-1, 0]


def test_a_parameter_budget_keeps_the_largest_that_it_can_pay_for():
    omega = torch.tensor([1.0, 3.0, 2.0])
    assert hard_threshold(omega, Budget(costs=(1, 4, 3), limit=4)).tolist() == [0, 3, 0]
    assert hard_threshold(omega, Budget(costs=(1, 5, 3), limit=4)).tolist() == [1, 0, 2]


@given(OMEGAS)
def test_a_zero_gradient_changes_nothing_whatever_the_budget(omega):
    budget = Budget.of_count(1, n=len(omega))
    same = stoiht_step(omega, torch.zeros_like(omega), gate_lr=5.0, budget=budget)
    assert same.equal(omega)
    assert same.data_ptr() != omega.data_ptr()


def test_one_gradient_that_is_not_zero_is_enough_to_threshold():
    step = stoiht_step(torch.ones(3), torch.tensor([0.0, 0.0, 1e-20]), gate_lr=5.0, budget=Budget.of_count(1, n=3))
    assert step.tolist() == [1, 0, 0]


@given(OMEGAS, st.data())
def test_a_step_is_the_threshold_of_the_gradient_step(omega, data):
    n = len(omega)
    gradient = torch.tensor(data.draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n).filter(any))).float()
    budget = Budget.of_count(data.draw(st.integers(1, n)), n=n)
    before, moved = (omega.clone(), gradient.clone()), omega - 0.5 * gradient  # halves are exact too
    assert stoiht_step(omega, gradient, gate_lr=0.5, budget=None).equal(moved)
    step = stoiht_step(omega, gradient, gate_lr=0.5, budget=budget)
    assert step.equal(hard_threshold(moved, budget))
    assert omega.equal(before[0])
    assert gradient.equal(before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    omega = torch.tensor([1.0, 2.0], dtype=dtype)
    assert stoiht_step(omega, omega, gate_lr=0.1, budget=Budget.of_count(1, n=2)).dtype == dtype
