"""Rules that read no batch: condition numbers against closed forms, sites at random, and parameters alone."""

import pytest
import torch
from peft import LoraConfig
from peft.utils.integrations import dequantize_module_weight
from selecting import fingerprint
from torch import nn
from transformers.pytorch_utils import Conv1D

from weightlora import select
from weightlora.cost.knapsack import additive_cost
from weightlora.errors import OptionError
from weightlora.plan.plan import make_plan
from weightlora.selection._course import measured_by
from weightlora.selection.allocate import Costs
from weightlora.selection.rules import rule_of
from weightlora.selection.rules.kappa_tune import KappaTune

D = 6


class Net(nn.Module):
    """Linear layers in double precision; nothing runs it."""

    def __init__(self, weights):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in weights).double()
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data = weight


def chosen(net, *, rule, adapters, **options):
    return select(net, (), lora=LoraConfig(r=2), rule=rule, adapters=adapters, progress=False, **options)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed):
    return torch.linalg.qr(drawn(D, D, seed=seed)).Q


def test_condition_numbers_of_known_weights():
    stretched = orthogonal(0) @ torch.diag(torch.tensor([8.0, 7, 6, 5, 4, 2]).double()) @ orthogonal(1)
    singular = torch.outer(drawn(D), drawn(D, seed=1))
    plan = chosen(Net([orthogonal(0), stretched, singular, 0 * singular]), rule="kappa_tune", adapters=2)
    assert [*plan.scores.values()] == pytest.approx([1, 2 / 8, 0, 0], abs=1e-12)
    assert plan.names == ("layers.0", "layers.1")
    assert len(plan.history) == 1
    assert [entry.score_error for entry in plan.entries] == [None] * 4


def test_condition_number_of_a_transposed_and_of_a_quantised_weight(quantised_net):
    layer = Conv1D(3, D)
    values = torch.linalg.svdvals(layer.weight.detach())
    found = select(nn.Sequential(layer), (), lora=LoraConfig(r=2, fan_in_fan_out=True), adapters=1, rule="kappa_tune")
    assert [*found.scores.values()] == pytest.approx([float(values[-1] / values[0])])
    expected = []
    for place in (0, 2):
        values = torch.linalg.svdvals(dequantize_module_weight(quantised_net[place]).float())
        expected.append(float(values[-1] / values[0]))
    found = select(quantised_net, (), lora=LoraConfig(r=2), adapters=1, rule=KappaTune())
    assert [*found.scores.values()] == pytest.approx(expected, rel=1e-4)


class Decoder(nn.Module):
    """Twelve blocks with Llama's names: block 10 follows block 9, and not block 1."""

    def __init__(self, blocks=12):
        super().__init__()
        shapes = {"q": (D, D), "k": (D, 2), "v": (D, 2), "o": (D, D)}
        self.layers = nn.ModuleList()
        for _ in range(blocks):
            attention = nn.ModuleDict({f"{name}_proj": nn.Linear(*shape) for name, shape in shapes.items()})
            mlp = {"gate_proj": nn.Linear(D, 16), "up_proj": nn.Linear(D, 16), "down_proj": nn.Linear(16, D)}
            self.layers.append(nn.ModuleDict({"self_attn": attention, "mlp": nn.ModuleDict(mlp)}))


def endings(names):
    return {name.rsplit(".", 1)[-1] for name in names}


def test_stratified_keeps_half_of_every_projection():
    plan = chosen(Decoder(), rule="stratified", adapters=42)
    counts = {ending: sum(name.endswith(ending) for name in plan.names) for ending in endings(plan.scores)}
    assert set(counts.values()) == {6}
    assert len(counts) == 7
    assert chosen(Decoder(), rule="stratified", adapters=42, seed=1).names != plan.names
    # Negative control: a plain draw is not so even.
    order = [list(plan.scores)[i] for i in torch.randperm(84, generator=torch.Generator().manual_seed(0))[:42]]
    assert {sum(name.endswith(ending) for name in order) for ending in counts} != {6}


def test_stratified_keeps_the_same_share_of_projections_of_unequal_number():
    """Of n sites, K of N kept: every projection keeps its share but for less than one site."""
    net = nn.Module()
    net.layers = nn.ModuleList()
    for i in range(20):
        block = {"up": nn.Linear(D, D), **({"down": nn.Linear(D, D)} if i % 4 == 0 else {})}
        net.layers.append(nn.ModuleDict(block))
    for k in range(1, 26):
        names = chosen(net, rule="stratified", adapters=k, seed=k).names
        downs = sum(name.endswith("down") for name in names)
        assert abs(downs - 5 * k / 25) < 1
    # Without the random shift of each projection, one down and one up would always tie at the top.
    pairs = {
        tuple(sorted(name.split(".")[-1] for name in chosen(net, rule="stratified", adapters=2, seed=seed).names))
        for seed in range(20)
    }
    assert ("up", "up") in pairs


def test_a_blind_rule_has_no_steps_of_a_head():
    with pytest.raises(OptionError, match=r"no setting 'head_steps'.*it has none"):
        rule_of("kappa_tune", head_steps=3)


@pytest.mark.parametrize("rule", ["kappa_tune", "stratified"])
def test_each_rule_picks_sites_of_minilm_and_takes_no_batch(minilm, rule):
    before = fingerprint(minilm)
    plan = select(minilm, (), lora=LoraConfig(r=2, task_type="SEQ_CLS"), adapters=5, rule=rule, progress=False)
    assert fingerprint(minilm) == before
    assert len(plan.names) == 5
    assert all(plan.scores[name] > 0 for name in plan.names)
    assert plan.options["head_steps"] == 0
    assert "agreement" not in plan.options


# -- parameters alone: ranks are free, nothing is scored, and the answer is the trivial one where it is exact --------


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
    low = int(10 * share)
    # Single sites have 1; where all have 1, single sites have 2.
    assert {*plan.ranks.values()} == ({low, low + 1} if low < 2 else {low})
    assert plan.lora_parameters * min(share, max(low, 2) / 10) - 16 < plan.parameters <= plan.lora_parameters * share


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
        sites, LoraConfig(r=10, lora_alpha=20), plan.names, ranks=dict.fromkeys(plan.names, 1), alpha_by="least"
    )
    assert [entry.alpha for entry in plan.entries] == [entry.alpha for entry in by_hand.entries] == [2] * 6  # 20 · 0.1


@pytest.mark.parametrize(("ranks", "share"), [([8, 0], 0.4), ([4, 0], 0.4), ([16, 0], 0.8), ([16, 8], 2.0)])
def test_a_rank_above_the_users_is_in_the_recorded_step_time(ranks, share):
    """Adapters of 4 and 6 ns at rank 8. A lower rank counts as rank 8; the largest growth counts for all kept sites."""
    costs = Costs(ranks=(8, 8), of_rank=(1, 1), time=additive_cost([4, 6]))
    assert measured_by(costs, ranks, 0) == {"step_time": pytest.approx(share)}
