"""The parameters that a plan and a budget count are those that PEFT trains, whatever the config adds to A and B."""

import random
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig
from torch import nn

import weightlora
from weightlora.errors import OptionError
from weightlora.methods import make_method
from weightlora.model.sites import adapter_parameters, find_sites
from weightlora.plan.budget import Budget, chosen_ranks
from weightlora.plan.limits import Limits
from weightlora.plan.make import make_plan, read_adapter
from weightlora.selection.allocate import site_budget

KINDS = [{}, {"lora_bias": True}, {"use_dora": True}]  # PEFT refuses both at once


def any_net(rng: random.Random) -> nn.Sequential:
    """Two to six layers of any width."""
    widths = [rng.randint(1, 9) for _ in range(rng.randint(3, 7))]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("ignore:parameters=1.0")
@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_budgets_count_what_peft_trains(kind, tmp_path):
    for seed in range(40):
        rng = random.Random(seed)
        net = any_net(rng)
        lora = LoraConfig(r=rng.randint(1, 4), target_modules="all-linear", rank_pattern={"1": 2}, **kind)
        sites = find_sites(net, lora).sites
        sizes = adapter_parameters(sites, lora)
        every = make_plan(sites, lora, list(sizes))
        assert every.lora_sizes == tuple(sizes.values())
        assert every.parameters == every.lora_parameters == trained(every.attach(any_net(random.Random(seed))))
        if min(sizes.values()) > 0.5 * sum(sizes.values()):
            continue
        parameters = rng.choice([0.5, 0.9, 1.0, max(sizes.values())])
        budget = site_budget(sites, lora, Limits(parameters=parameters))
        chosen = budget.choose([rng.random() for _ in sites])
        plan = make_plan(sites, lora, [sites[i].name for i in chosen])
        assert plan.parameters <= budget.limit
        for one in (plan, plan.expand()):
            attached = one.attach(any_net(random.Random(seed)))
            assert trained(attached) == one.parameters <= one.lora_parameters
    one.save_adapter(attached, tmp_path / "adapter")
    (tmp_path / "adapter" / "plan.json").unlink()
    assert read_adapter(tmp_path / "adapter").parameters == one.parameters


@pytest.mark.parametrize("vectors", [0, 1])
def test_single_ranks_stay_within_the_budget_with_their_fixed_parameters(vectors):
    spent = []
    for seed in range(300):
        rng = random.Random(seed)
        outs = [rng.randint(1, 9) for _ in range(rng.randint(1, 6))]
        widths = [out + rng.randint(1, 9) for out in outs]
        ranks = [rng.randint(1, 5) for _ in outs]
        costs = [r * w + vectors * out for r, w, out in zip(ranks, widths, outs, strict=True)]
        limit = rng.randint(1, sum(costs))
        scores = [[rng.uniform(-0.2, 1) for _ in range(r)] for r in ranks]
        kept = chosen_ranks(Budget(tuple(costs), limit, tuple(vectors * out for out in outs)), scores)
        total = sum(r * w + vectors * out for r, w, out in zip(kept, widths, outs, strict=True) if r)
        assert total <= limit
        assert all(r <= sum(score > 0 for score in own) for r, own in zip(kept, scores, strict=True))
        spent.append(total / limit)
    assert sum(spent) / len(spent) > 0.5  # not by keeping nothing


def test_no_fixed_parameters_are_no_other_choice():
    for seed in range(200):
        rng = random.Random(seed)
        ranks = [rng.randint(1, 5) for _ in range(rng.randint(1, 6))]
        costs = tuple(r * rng.randint(1, 9) for r in ranks)
        scores = [[rng.uniform(-0.2, 1) for _ in range(r)] for r in ranks]
        limit = rng.randint(1, sum(costs))
        zeros = (0,) * len(ranks)
        assert chosen_ranks(Budget(costs, limit, zeros), scores) == chosen_ranks(Budget(costs, limit), scores)


def squared(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(batch["x"]) - 1).square().mean()


@pytest.mark.parametrize("rule", ["first_order", "integrated_ranks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_selection_keeps_its_budget(kind, rule):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    batches = [{"x": torch.randn(8, 6)} for _ in range(8)]
    lora = LoraConfig(r=2, target_modules="all-linear", **kind)
    fields = {"lora": lora, "rule": rule, "loss_fn": squared, "progress": False, "steps": 3, "learning_rate": 0.01}
    # An adapter has 2·12 parameters and a vector 6. Two adapters' matrices are 48: with vectors, fewer fit.
    plan = weightlora.select(net, batches, parameters=48, **fields)
    assert 0 < plan.parameters <= 48
    assert trained(plan.attach(net)) == plan.parameters


def test_bytes_count_the_biases_too():  # DoRA saves more than is counted, and is refused: tests/cost/test_cost.py
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    batches = [{"x": torch.randn(8, 6)} for _ in range(4)]
    sizes = []
    for kind in ({}, {"lora_bias": True}):
        lora = LoraConfig(r=2, target_modules="all-linear", **kind)
        plan = weightlora.select(net, batches, lora=lora, memory="1GB", loss_fn=squared, progress=False, steps=3)
        assert len(plan.names) == 6
        sizes.append(plan.options["peak_bytes"])
    # Six vectors of six fp32 numbers, each with a gradient and AdamW's two moments.
    assert sizes[1] - sizes[0] == 6 * 6 * 4 * 4


def test_dora_with_a_bias_is_refused_in_one_line():
    lora = LoraConfig(r=2, target_modules="all-linear", lora_bias=True)
    with pytest.raises(OptionError, match="lora_bias=True is not allowed with DoRA"):
        make_method("dora").attach(nn.Sequential(nn.Linear(4, 4)), lora, (), 1)
