"""``steps="auto"``: when the scores are looked at, when they are settled, what a selection takes, how it is told."""

import io
import itertools
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from tqdm import tqdm

from weightlora.errors import OptionError
from weightlora.selection.progress import Progress
from weightlora.selection.rules import RULES, rule_of
from weightlora.selection.rules.base import Scores
from weightlora.selection.rules.integrated import Integrated
from weightlora.selection.rules.pursuit import Pursuit
from weightlora.selection.select import select
from weightlora.selection.steps import (
    SETTLED,
    check_steps,
    default_times,
    likeness,
    reading_times,
    scoring_steps,
    settled,
)

BRANCHES = 12
LORA = LoraConfig(r=2)
READING = [entry.name for entry in RULES if rule_of(entry.name).batches((10,)) > 0]
AT_ONCE = {"pursuit", "paper"}
"""Rules that yield the last scores only."""


class TwoRounds(Pursuit):
    """The rule with as many rounds as the tests keep sites."""

    rounds = 2


class Branches(nn.Module):
    """The sum of single layers, each with its own part of the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(4, 4) for _ in range(BRANCHES)])

    def forward(self, x):
        return sum(branch(x[:, i]) for i, branch in enumerate(self.branches))


def loss(model, batch):
    return (model(batch["x"]).sum(1) - batch["y"]).square().mean()


def planted(count, wanted, noise):
    """Batches whose target depends on the inputs of the branches ``wanted``, and on chance."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(64, BRANCHES, 4, generator=generator)
        yield {"x": x, "y": 20 * x[:, wanted].sum((1, 2)) + noise * torch.randn(64, generator=generator)}


def chosen(wanted, noise, rule="first_order", **options):
    asked = {"lora": LORA, "adapters": max(2, len(wanted)), "steps": "auto", "loss_fn": loss, **options}
    return select(Branches(), planted(400, wanted, noise), rule=rule, **asked)


def test_a_clear_choice_stops_early_and_noise_goes_on_to_the_end():
    clear = chosen([1, 5], noise=1.0)
    assert clear.names == ("branches.1", "branches.5")
    assert clear.options["scored"] == 15
    assert clear.options["steps"] == "auto"
    assert len(clear.history) == 15
    with pytest.warns(UserWarning, match="cannot tell the sites apart"):
        assert chosen([], noise=1000.0).options["scored"] == 30


def test_stopping_early_changes_nothing_but_the_number_of_steps():
    auto = chosen([1, 5], noise=1.0)
    fixed = chosen([1, 5], noise=1.0, steps=15)
    assert auto.scores == fixed.scores
    assert auto.names == fixed.names


@pytest.mark.parametrize("name", READING)
def test_no_rule_takes_more_passes_than_allowed(name):
    rule = rule_of(name)
    for total, passes in ((None, 30), (1_000, 30), (10_000, 300), (100_000, 3000)):
        times = reading_times("auto", rule, total)
        assert rule.passes(times) <= passes < 2 * rule.passes(times)
        assert all(2 * a <= b <= 2 * a + 1 for a, b in itertools.pairwise(times))
        assert times[0] >= 6


def test_looks_leave_half_of_the_passes_to_the_steps():
    """A look takes 3·30 passes: two of them would leave 120 of 300."""

    def read_from(count):
        return type("Read", (Integrated,), {"probes": count})()

    assert reading_times("auto", read_from(30), 10_000) == (210,)
    assert reading_times("auto", read_from(24), 10_000) == (78, 156)


@pytest.mark.parametrize("name", READING)
def test_rules_say_how_many_batches_and_passes_they_take(name):
    """What is drawn from the loader, and how often the model runs, counted."""
    calls = {"batches": 0, "passes": 0}

    def batches():
        for batch in planted(400, [1, 5], noise=1e4):
            calls["batches"] += 1
            yield batch

    def counted(model, batch):
        calls["passes"] += 1
        return loss(model, batch) * 1e-9  # StoIHT needs small gradients

    rule = TwoRounds() if name == "pursuit" else rule_of(name)  # it takes no more rounds than it keeps sites
    plan = select(
        Branches(), batches(), rule=rule, lora=LORA, adapters=2, steps="auto", total_steps=3_000, loss_fn=counted
    )
    times = reading_times("auto", rule, 3_000)
    read = times[: times.index(plan.options["scored"]) + 1]
    assert len(times) > 1
    assert name not in AT_ONCE or read == times
    assert calls == {"batches": rule.batches(read), "passes": rule.passes(read)}


@pytest.mark.parametrize(
    "name", [name for name in READING if not rule_of(name).trains_adapters and name not in AT_ONCE]
)
def test_a_look_at_the_scores_leaves_them_as_they_are(name):
    short, long = (chosen([1, 5], noise=1.0, rule=name, steps=steps) for steps in (15, 30))
    assert long.history[:15] == short.history


@pytest.mark.parametrize("name", ["integrated", "integrated_ranks", "even_ranks"])
def test_a_rule_that_trains_goes_on_where_it_was_when_it_looked(name):
    """Looks after 13, 27 and 54 steps. The first one is that of T = 13, and the loss saved grows from look to look."""
    # Two of twelve sites: √(2/12) of the rate.
    options = {"rule": name, "adapters": None, "parameters": 0.2, "learning_rate": 0.02 * 6**0.5}
    with pytest.warns(UserWarning, match="cannot tell the sites apart"):  # without noise to speak of, all are useful
        auto = chosen(list(range(BRANCHES)), noise=1.0, total_steps=3_000, **options)
    first = chosen(list(range(BRANCHES)), noise=1.0, steps=13, **options)
    assert auto.options["scored"] in (27, 54)
    assert auto.history[:4] == first.history
    saved = [sum(row) for row in auto.history[3::4]]
    assert saved == sorted(saved)
    assert saved[0] > 0


def scores(*sizes, halves=None):
    return Scores((sizes,), (True,) * len(sizes), sizes, halves=halves)


def best_two(found):
    both = [found.sizes, *(found.halves or ())]
    return [dict.fromkeys(sorted(range(len(s)), key=lambda i: -s[i])[:2], 1) for s in both]


def test_settled_needs_the_choice_before_and_both_halves():
    same = ((3.0, 2.0, 1.0), (9.0, 8.0, 1.0))
    other = ((3.0, 2.0, 1.0), (1.0, 2.0, 3.0))
    found = [
        (1, scores(3.0, 2.0, 1.0, halves=same)),  # nothing before it
        (2, scores(1.0, 2.0, 3.0, halves=same)),  # another choice than before
        (3, scores(1.0, 2.0, 3.0, halves=other)),  # the halves disagree
        (4, scores(1.0, 2.0, 3.0, halves=same)),
        (5, scores(1.0, 2.0, 3.0, halves=same)),
    ]
    closed = []

    def generator(count):
        try:
            yield from found[:count]
        finally:
            closed.append(count)

    whole, short = generator(5), generator(3)  # named, so that only settled() can close them
    assert settled(whole, best_two)[0] == 4
    assert settled(short, best_two)[0] == 3  # the last one, whatever it is
    assert closed == [5, 3]


def test_likeness_is_jaccards_index():
    kept = dict.fromkeys(range(10), 1)
    four_of_five = dict.fromkeys(range(2, 12), 1)
    assert likeness(kept, four_of_five) == pytest.approx(SETTLED)
    assert likeness(kept, kept) == 1
    assert likeness(kept, {99: 1}) == 0
    assert likeness({}, {}) == 1


@pytest.mark.parametrize("steps", ["soon", 1, 0, -3, 2.5, True, "2.5", "", None])
def test_other_steps_are_refused(steps):
    with pytest.raises(OptionError, match=r"steps=.* is not allowed: give"):
        check_steps(steps)


@pytest.mark.parametrize(
    ("total", "t"), [(None, 20), (0, 20), (1, 20), (4000, 20), (4001, 21), (10_000, 50), (10_001, 51)]
)
def test_scoring_is_half_a_percent_rounded_up_and_at_least_twenty(total, t):
    assert scoring_steps(total) == t


@pytest.mark.parametrize(
    ("scoring", "training", "level", "says"),
    [
        (20, 400, logging.INFO, r"^scoring takes 20 steps, 5 % of the 400 steps of the training$"),
        (20, 399, logging.WARNING, r"20 steps, 5 % .* only where a step of the plan takes less than 0\.95 of LoRA's"),
        (40, 50, logging.WARNING, r"40 steps, 80 % .* less than 0\.20 of LoRA's .*leave steps and rule"),
        (40, 20, logging.WARNING, r"40 steps, 200 % .* in no case"),
    ],
)
def test_what_scoring_costs_is_said_and_what_to_do_where_it_is_much(scoring, training, level, says):
    from weightlora.selection.steps import scoring_cost

    found, line = scoring_cost(scoring, training)
    assert found == level
    assert re.search(says, line)
    assert "at most" in scoring_cost(scoring, training, most=True)[1]


def test_a_selection_logs_its_cost_before_and_its_seconds_after(caplog):
    """A head is trained 2 steps alone, then 3 score: 5 of 20 steps are a quarter, of 100 steps a twentieth."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    asked = {"lora": lora, "adapters": 1, "steps": 3, "rule": rule_of("first_order", head_steps=2), "progress": False}
    batches = [{"x": torch.ones(2, 4)}] * 5
    caplog.set_level(logging.INFO, "weightlora")
    for total, level, share in ((20, logging.WARNING, "25 %"), (100, logging.INFO, "5 %")):
        select(net, batches, loss_fn=lambda model, batch: model(batch["x"]).square().mean(), total_steps=total, **asked)
        (_, before, line), (_, after, seconds) = caplog.record_tuples
        assert (before, after) == (level, level)
        assert f"5 steps, {share} of the {total} steps" in line
        assert re.fullmatch(r"selection took \d+\.\d s", seconds)
        caplog.clear()


# -- how many steps the default spends of a training of known length -------------------------------------------------


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("spent", [0, 1, 7])
def test_the_default_spends_at_most_three_per_cent_and_never_scores_on_one_batch(has_head, spent):
    for total in range(3000):
        head, times = default_times(total, has_head=has_head, spent=spent)
        if times:
            assert 100 * (head + times[-1] + spent) <= 3 * total
            assert times[-1] >= 2
            assert (head > 0) == has_head
        else:  # not even two steps, and one of a new head
            assert 100 * (2 + has_head + spent) > 3 * total


# -- where no bar is shown, the log has a line every half minute; where one is, it has none --------------------------


@pytest.mark.parametrize("shown", [True, False])
def test_a_line_every_half_minute_where_there_is_no_bar(shown, caplog):
    caplog.set_level(logging.INFO, "weightlora")
    clock, output = SimpleNamespace(seconds=0.0), io.StringIO()
    with tqdm(total=20, file=output, disable=not shown) as bar:
        progress = Progress(bar, "head", now=lambda: clock.seconds)
        for step in range(1, 17):  # of 8 seconds each
            clock.seconds += 8
            if step == 5:
                progress.set_description("scoring")
            progress.update()
    lines = [] if shown else ["head: 4 of 20", "scoring: 8 of 20", "scoring: 12 of 20", "scoring: 16 of 20"]
    assert caplog.messages == lines
    assert ("16/20" in output.getvalue()) == shown
