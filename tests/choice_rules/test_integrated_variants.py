"""Variants of ``integrated`` that the study compared: other rates, and rounds that drop sites in between."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import nn

from benchmarks.choice.rules.integrated import Eliminated, Varied
from weightlora import select
from weightlora.errors import OptionError
from weightlora.model.sites import find_sites
from weightlora.plan.budget import Budget
from weightlora.selection.rules.integrated import Integrated
from weightlora.selection.select import select_trained
from weightlora.selection.stage import adapter_weights, probed, train_adapters

pytestmark = pytest.mark.slow  # rules of the study, not of the package
LORA = LoraConfig(r=2, lora_alpha=6)
STEPS, RATE = 8, 0.05


class Net(nn.Module):
    """Four layers with a tanh after each, in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)).double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Rounds(Eliminated):
    """Scores that are read from two batches."""

    probes = 2


def batches(count):
    torch.manual_seed(1)
    return [{"x": torch.randn(8, 6).double(), "y": torch.rand(8, 6).double()} for _ in range(count)]


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).mean()


def selected(rule, *, steps=6, data, adapters=1):
    options = {"lora": LORA, "adapters": adapters, "steps": steps, "learning_rate": RATE, "progress": False}
    return select(Net(), data, rule=rule, loss_fn=squared, **options)


def test_rounds_drop_sites_and_those_that_stay_learn_without_them():
    data = batches(14)
    plan = selected(Eliminated(rounds=2), data=data)
    first = selected(Integrated(), data=data[:7], steps=3)
    assert plan.history[:4] == first.history  # the first of two rounds: half of the steps, all sites
    staying = sorted(first.scores, key=lambda name: -first.scores[name])[:2]  # 4·(1/4)^(1/2)
    assert {name for name, score in plan.scores.items() if score != 0} == set(staying)
    assert plan.names[0] in staying


def test_more_rounds_than_steps_are_named():
    with pytest.raises(OptionError, match="steps=2 is not allowed: give at least rounds=3"):
        selected(Eliminated(rounds=3), steps=2, data=batches(14))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Varied(lr_scale=0), "lr_scale=0"),
        (lambda: Varied(lr_scale=float("nan")), "lr_scale=nan"),
        (lambda: Varied(nodes=0), "nodes=0"),
        (lambda: Eliminated(rounds=1), "rounds=1"),
    ],
)
def test_settings_out_of_range_are_named(make, named):
    with pytest.raises(OptionError, match=named):
        make()


@pytest.mark.parametrize(("scale", "moves"), [(3.0, 3.0), (None, 0.5)])
def test_the_first_step_is_as_long_as_the_rate_that_was_asked_for(scale, moves):
    """AdamW's first step is the rate in each weight, whatever the gradient; its eps takes some 1e-3 of it."""
    rule, net = Varied(lr_scale=scale), Net()
    sites = find_sites(net, LORA).sites
    with probed(net, LORA, sites, batches=batches(5), steps=5, seed=0, loss_fn=squared) as stage:
        next(rule.score(replace(stage, learning_rate=RATE), (1,), Budget.of_count(1, n=4)))
        moved = [b.detach().abs().mean().item() for b in stage.parameters("lora_B")]
    assert moved == pytest.approx([RATE * moves] * 4, rel=1e-2)


def test_survivors_of_two_rounds_are_those_that_trained_on_without_the_site_dropped_between():
    rule, net, held_out = Rounds(rounds=2), Net(), batches(STEPS + 5)[-1]
    data = batches(rule.batches((STEPS,)))
    asked = {"lora": LORA, "adapters": 2, "steps": STEPS, "learning_rate": RATE, "loss_fn": squared, "progress": False}
    trained = select_trained(Net(), data, rule=rule, **asked)
    staying = [name for name, score in trained.plan.scores.items() if score]
    assert len(staying) == 3  # 4·√½, on the way from 4 to 2
    with probed(
        net, LORA, find_sites(net, LORA).sites, batches=data, steps=len(data), seed=0, loss_fn=squared
    ) as stage:
        train_adapters(stage, steps=4, learning_rate=RATE, scale=(2 / 4) ** 0.5)  # two of four sites are kept
        assert len(list(stage.take(2))) == 2  # the first round's scores

        def switch_off(names):
            with torch.no_grad():
                for name in names:
                    adapter_weights(stage, [name])[1].zero_()

        switch_off(set(stage.layers) - set(staying))
        train_adapters(stage, steps=4, learning_rate=RATE, names=staying, scale=(2 / 3) ** 0.5)
        all_three = squared(net, held_out).item()
        switch_off(set(staying) - set(trained.plan.names))
        expected = squared(net, held_out).item()
    first = squared(trained.attach(Net()), held_out).item()
    assert first == expected
    assert first != pytest.approx(all_three, rel=1e-4)  # negative control
