"""The rule ``pursuit``: its rounds against a loop written out here, and twins of which it keeps one."""

import random
from fractions import Fraction

import pytest
import torch
from peft import LoraConfig
from test_scoring import LORA, SCALE, Net, batches, squared
from torch import nn

from weightlora import select
from weightlora.cost.knapsack import ANY, CostBudget, Item, make_cost
from weightlora.errors import OptionError
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.budget import Budget
from weightlora.plan.limits import Limits
from weightlora.selection.allocate import site_budget
from weightlora.selection.rules.first_order import FirstOrder
from weightlora.selection.rules.pursuit import Pursuit, more_kept
from weightlora.selection.select import select_trained

RATE = 0.05


def pursuit(rounds, probes=4):
    """The rule with other numbers of rounds and of batches in each."""
    return type("Rounds", (Pursuit,), {"rounds": rounds, "probes": probes})()


def asked(rule, *, steps, data=None, model=None, loss_fn=squared, adapters=2, **options):
    """What ``select`` takes, and A as the scoring began with it, once the loss was asked for."""
    started = []

    def loss(model, batch):
        if not started:
            started.extend(layer.lora_A["default"].weight.detach().clone() for layer in lora_layers(model).values())
        return loss_fn(model, batch)

    given = {
        "lora": LORA,
        "adapters": adapters,
        "steps": steps,
        "learning_rate": RATE,
        "loss_fn": loss,
        "progress": False,
        **options,
    }
    data = batches(rule.batches((steps,))) if data is None else data
    return {"model": model or Net(), "batches": data, "rule": rule, **given}, started


def selected(rule, **options):
    return select(**asked(rule, **options)[0])


def slow_pursuit(a, data, *, rounds, probes, steps, k):
    """The kept sites in their order, and each site's scores by round: AdamW on A and B of those that are kept."""
    layers, data = Net().layers, iter(data)
    a = [start.clone().requires_grad_() for start in a]
    b = [torch.zeros(6, 2, dtype=torch.float64, requires_grad=True) for _ in layers]

    def loss():
        batch = next(data)
        x = batch["x"]
        for i, layer in enumerate(layers):
            x = torch.tanh(x @ (layer.weight + SCALE * b[i] @ a[i]).T + layer.bias)
        return (x - batch["y"]).pow(2).mean()

    kept, history = {}, []
    for done in range(1, rounds + 1):
        gradients = zip(*(torch.autograd.grad(loss(), b) for _ in range(probes)), strict=True)
        left = [sum(own).abs().sum().item() / probes for own in gradients]
        history.append([kept.get(i, score) for i, score in enumerate(left)])
        others = sorted(set(range(4)) - set(kept), key=lambda i: -left[i])
        kept |= {i: left[i] for i in others[: -(-k * done // rounds) - len(kept)]}
        if done < rounds:
            optimizer = torch.optim.AdamW([matrix for i in kept for matrix in (a[i], b[i])], lr=RATE)
            for _ in range(steps // (rounds - 1)):
                loss().backward()
                optimizer.step()
                for matrix in (*a, *b):
                    matrix.grad = None
    return list(kept), history


@pytest.mark.parametrize("rounds", [2, 3])
def test_rounds_are_those_of_a_slow_loop(rounds):
    rule, steps = pursuit(rounds, probes=3), 6
    data = batches(rule.batches((steps,)))
    given, started = asked(rule, steps=steps, data=data, adapters=3)
    plan = select(**given)
    kept, history = slow_pursuit(started, data, rounds=rounds, probes=3, steps=steps, k=3)
    assert {*plan.names} == {f"layers.{i}" for i in kept}
    torch.testing.assert_close(torch.tensor(plan.history), torch.tensor(history), rtol=1e-5, atol=1e-8)
    assert list(plan.scores.values()) == list(plan.history[-1])
    assert not torch.tensor(history[0]).allclose(torch.tensor(history[-1]), rtol=1e-2)  # the rounds do differ


def test_the_first_round_is_first_order():
    data = batches(20)
    plan = selected(pursuit(2, probes=5), steps=4, data=data)
    first = selected(FirstOrder(), steps=5, data=data)
    assert plan.history[0] == pytest.approx(first.history[-1], rel=1e-6)
    # What was kept in the first round has its error of that round, too.
    place = max(range(4), key=lambda i: first.entries[i].score)
    kept, best = plan.entries[place], first.entries[place]
    assert (kept.score, kept.score_error) == pytest.approx((best.score, best.score_error), rel=1e-6)


class Twins(nn.Module):
    """Two layers that can do the same work, and a third one with less to do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twin, self.other, self.third = (nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x):
        return torch.cat([self.twin(x) + self.other(x), self.third(x)], dim=-1)


def taught():
    """Batches of a teacher with an update of rank one in the twins' work, and a smaller one in the third's."""
    teacher = Twins()
    with torch.no_grad():
        torch.manual_seed(3)
        teacher.twin.weight += torch.outer(torch.randn(6), torch.randn(6))
        teacher.third.weight += 0.5 * torch.outer(torch.randn(6), torch.randn(6))
        inputs = [torch.randn(32, 6).double() for _ in range(80)]
        return [{"x": x, "y": teacher(x)} for x in inputs]


def test_of_twins_one_is_kept():
    plan = selected(pursuit(2), steps=60, data=taught(), model=Twins())
    assert "third" in plan.names
    assert len({"twin", "other"} & {*plan.names}) == 1
    # Negative control: each twin alone has more to gain than the third.
    assert {*selected(FirstOrder(), steps=8, data=taught(), model=Twins()).names} == {"twin", "other"}


def test_warm_start_hands_on_what_was_trained_before_the_last_round():
    given, _ = asked(pursuit(2), steps=4)
    trained = select_trained(**given)
    model = trained.attach(Net())
    first = max(range(4), key=lambda i: trained.plan.history[0][i])
    moved = {name: bool(layer.lora_B["default"].weight.any()) for name, layer in lora_layers(model).items()}
    assert moved == {name: name == f"layers.{first}" for name in trained.plan.names}


class Widths(nn.Module):
    """Layers of two widths, so that scores per parameter rank them differently."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(6, 24) for _ in range(3)).double()
        self.down = nn.ModuleList(nn.Linear(24, 6) for _ in range(3)).double()

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


def budgets():
    """A budget of each kind over six sites: parameters, and costs that depend on the lowest site."""
    lora = LoraConfig(r=2)
    sites = find_sites(Widths(), lora).sites
    own = [Item(2, ((1 << i, 1 << i),)) for i in range(6)]
    below = [Item(1, ((ANY, 1 << i),)) for i in range(6)]
    return {
        "score": site_budget(sites, lora, Limits(parameters=0.5)),
        "cost": CostBudget((make_cost(6, [*own, *below], range(6)),), (9,)),
    }


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["score", "cost"])
def test_sites_whose_scores_are_overtaken_stay(kind, seed):
    """Scores of other sites grow tenfold from round to round, so that few large ones take the place of many."""
    budget, draw, kept = budgets()[kind], random.Random(seed), {}
    for done in range(1, 5):
        scores = [kept.get(i, 10**done * draw.random()) for i in range(6)]
        now = more_kept(budget, scores, kept, Fraction(done, 4))
        assert {*now[: len(kept)]} == {*kept}
        kept = {i: scores[i] for i in now}


def test_a_step_time_is_a_budget():
    plan = selected(pursuit(2), steps=4, time=0.9, model=Widths(), lora=LoraConfig(r=2))
    assert 0 < plan.options["step_time"] <= 0.9


def test_a_large_site_leaves_fewer_places_and_drops_none():
    """Of 12 places six are kept; a site that takes six leaves 7, of which two thirds are 5."""
    budget = Budget(costs=(*(1,) * 12, 6), limit=12)
    first = more_kept(budget, [1.0] * 12 + [0.5], [], Fraction(3, 6))
    assert first == [0, 1, 2, 3, 4, 5]
    assert more_kept(budget, [1.0] * 12 + [9.0], first, Fraction(4, 6)) == first
    assert more_kept(budget, [1.0] * 12 + [9.0], first, Fraction(6, 6)) == [*first, 12]


def test_one_site_is_that_of_first_order_and_nothing_is_trained():
    data = batches(4)  # no batch is left for training
    plan = selected(Pursuit(), steps=10, data=[*data, *[{"x": None}] * 30], adapters=1)
    assert plan.scores == pytest.approx(selected(FirstOrder(), steps=4, data=data, adapters=1).scores, rel=1e-6)


@pytest.mark.parametrize(("k", "steps"), [(2, 6), (4, 2)])
def test_there_are_no_more_rounds_than_sites_or_steps(k, steps):
    data = batches(40)
    most = min(k, steps + 1)
    many, fewer = (selected(pursuit(r), steps=steps, data=data, adapters=k) for r in (6, most))
    assert many.history == fewer.history
    assert len(many.history) == most


def test_spread_sites_are_no_budget():
    with pytest.raises(OptionError, match="ranking='spread'; give another ranking, or take another rule"):
        selected(Pursuit(), steps=10, ranking="spread")


@pytest.mark.parametrize(("rule", "steps"), [("first_order", 20), ("even_ranks", 30), ("pursuit", 100)])
def test_each_rule_has_a_number_of_steps_of_its_own(rule, steps):
    options = {"lora": LORA, "adapters": 2, "loss_fn": squared, "progress": False}
    assert select(Net(), batches(130), rule=rule, **options).options["steps"] == steps
    # Half a percent of a long training is more.
    assert select(Net(), batches(240), rule=rule, total_steps=40_000, **options).options["steps"] == 200
