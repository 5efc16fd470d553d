"""Parameters alone: ranks are free, nothing is scored, and the answer is the trivial one where it is exact."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from weightlora.cost.knapsack import additive_cost
from weightlora.plan.make import make_plan
from weightlora.selection._course import measured_by
from weightlora.selection.allocate import Costs
from weightlora.selection.select import select


class Unread:
    """Batches that must not be read."""

    def __iter__(self):
        raise AssertionError("a batch was read")


def net():
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])


@pytest.mark.parametrize(("share", "rank"), [(0.5, 5), (0.3, 3), (0.1, 1)])
def test_a_share_that_is_a_whole_rank_is_lora_of_that_rank(share, rank):
    """So that LoRA of a lower rank never beats it: it is the same plan."""
    plan = select(net(), Unread(), lora=LoraConfig(r=10, lora_alpha=20), parameters=share)
    assert {*plan.ranks.values()} == {rank}
    assert plan.to_lora_config().rank_pattern == {}
    assert plan.parameters == share * plan.lora_parameters


@pytest.mark.parametrize("share", [0.07, 0.15, 0.25, 0.37, 0.99])
def test_the_answer_has_every_rank_that_lora_of_a_lower_rank_has(share):
    """Site by site at least the rank of the largest uniform one, and within the limit."""
    plan = select(net(), Unread(), lora=LoraConfig(r=10), parameters=share)
    assert min(plan.ranks.values()) == int(10 * share)
    assert plan.lora_parameters * share - 16 < plan.parameters <= plan.lora_parameters * share  # 16: one more rank


def test_no_random_number_is_drawn_and_the_model_stays():
    model = net()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    select(model, Unread(), parameters=0.2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_rule_that_is_named_scores_and_keeps_whole_adapters():
    batches = [{"x": torch.ones(2, 8)}] * 4
    loss = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    plan = select(net(), batches, lora=LoraConfig(r=4), parameters=0.5, rule="first_order", steps=4, loss_fn=loss)
    assert sorted(plan.ranks.values()) == [0, 0, 0, 4, 4, 4]


def test_equal_to_a_plan_that_is_made_by_hand():
    model, lora = net(), LoraConfig(r=10, lora_alpha=20)
    plan = select(model, Unread(), lora=lora, parameters=0.1)
    sites = [entry.site for entry in plan.entries]
    by_hand = make_plan(
        sites, LoraConfig(r=10, lora_alpha=20), plan.names, ranks=dict.fromkeys(plan.names, 1), alpha_by="root"
    )
    assert [entry.alpha for entry in plan.entries] == [entry.alpha for entry in by_hand.entries] == [6] * 6  # 20·√0.1


@pytest.mark.parametrize(("ranks", "share"), [([8, 0], 0.4), ([4, 0], 0.4), ([16, 0], 0.8), ([16, 8], 2.0)])
def test_a_rank_above_the_users_is_in_the_recorded_step_time(ranks, share):
    """Adapters of 4 and 6 ns at rank 8. A lower rank counts as rank 8; the largest growth counts for all kept sites."""
    costs = Costs(ranks=(8, 8), of_rank=(1, 1), time=additive_cost([4, 6]))
    assert measured_by(costs, ranks, 0) == {"step_time": pytest.approx(share)}
