"""The time of a run with a store: the formula, the cost of every set of sites, and how blocks are timed."""

import random
from itertools import chain, combinations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ElectraConfig, ElectraForSequenceClassification, LlamaConfig, LlamaForCausalLM

from weightlora.cost import stored_run as timing
from weightlora.cost.knapsack import ANY, Item, make_cost
from weightlora.cost.stored_run import RunBudget, measured_run, stored_run
from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.plan.limits import Limits, floors_of, run_time
from weightlora.selection.allocate import Costs, allocate


def simulated(floor, rows, seen, forward, backward, rest):
    """The time of ``seen`` rows, one by one in turn; what was computed once below the floor is not computed again."""
    stored, time = set(), 0.0
    for i in range(seen):
        if i % rows not in stored:
            time += sum(forward[:floor]) / rows
            stored.add(i % rows)
        time += (sum(forward[floor:]) + sum(backward[floor:]) + rest) / rows
    return time


@pytest.mark.parametrize("seed", range(20))
def test_the_time_of_a_run_is_that_of_its_rows_one_by_one(seed):
    draw = random.Random(seed)
    blocks, rows, seen = draw.randint(1, 8), draw.randint(1, 9), draw.randint(1, 40)
    forward, backward = ([draw.random() for _ in range(blocks)] for _ in "fb")
    for floor in range(blocks + 1):
        found = run_time(floor, seen / rows, forward, backward, rest=0.3)
        assert found == pytest.approx(simulated(floor, rows, seen, forward, backward, 0.3))


@pytest.mark.parametrize("epochs", [1, 3, 8])
def test_equal_blocks_take_what_the_formula_says(epochs):
    """2(1 - f)E + f; without a store (2 - f)E, so that one epoch gains nothing."""
    each = [1 / 12] * 12
    for floor in range(13):
        f = floor / 12
        assert run_time(floor, epochs, each, each) == pytest.approx(2 * (1 - f) * epochs + f)
        assert run_time(floor, 1, each, each) == pytest.approx(2 - f)


def random_step(draw, blocks):
    """Blocks of one to three sites each; a forward pass that is always there, backward passes, adapters and a head."""
    forward, items, below, n = [], [], [], 0
    for _ in range(blocks):
        own = draw.randint(1, 3)
        inner = [1 << i for i in range(n, n + own)]
        n += own
        forward.append(draw.randint(1, 30))
        under = (1 << n) - 1
        items += [Item(draw.randint(1, 30), ((ANY, under),)), *(Item(draw.randint(1, 9), ((i, i),)) for i in inner)]
        below.append(under)
    head = draw.randint(0, 40)
    return forward, [*items, Item(sum(forward) + head, ((ANY, 1 << n),))], below, head, n


@pytest.mark.parametrize("seed", range(20))
def test_every_set_costs_its_steps_one_epoch_after_the_other(seed):
    """With the selection's steps; what is below the lowest kept block runs in the first epoch alone."""
    draw = random.Random(seed)
    forward, items, below, head, n = random_step(draw, draw.randint(1, 4))
    step, epochs, each = make_cost(n, items, range(n)), draw.randint(1, 6), 1000
    shares = [own / (sum(forward) + head) for own in forward]
    run = stored_run(step, shares, below, epochs, steps=epochs * each, selecting=25)
    for kept in chain.from_iterable(combinations(range(n), k) for k in range(n + 1)):
        floor = sum(not any(under >> i & 1 for i in kept) for under in below)
        first, later = step.of(kept), step.of(kept) - sum(forward[:floor])
        whole = each * (first + (epochs - 1) * later) + 25 * step.of_all
        assert run.cost.of(kept) * epochs * each == pytest.approx(whole, abs=epochs * each * (len(forward) + 1))


@pytest.mark.parametrize("seed", range(10))
def test_the_solver_takes_the_best_set_of_all_floors(seed):
    draw = random.Random(seed)
    forward, items, below, head, n = random_step(draw, 4)
    step = make_cost(n, items, range(n))
    run = stored_run(step, [own / (sum(forward) + head) for own in forward], below, 5, steps=500, selecting=10)
    costs = Costs((8,) * n, (10,) * n, time=step, run=run)
    scores, limit = [draw.random() for _ in range(n)], Limits(time=0.7)
    sets = chain.from_iterable(combinations(range(n), k) for k in range(1, n + 1))
    fitting = [kept for kept in sets if run.cost.of(kept) <= limit.time_of(step.of_all)]
    if not fitting:
        with pytest.raises(OptionError, match="train LoRA on all sites for 350 steps, which take as long"):
            allocate([Site(f"l.{i}", 5, 5) for i in range(n)], scores, costs, limit)
        return
    ranks = allocate([Site(f"l.{i}", 5, 5) for i in range(n)], scores, costs, limit)
    found = sum(score for score, r in zip(scores, ranks, strict=True) if r)
    assert found == pytest.approx(max(sum(scores[i] for i in kept) for kept in fitting), rel=1e-5)


def random_run(draw):
    """A run of random blocks, epochs and selection, with what it is made of."""
    forward, items, below, head, n = random_step(draw, draw.randint(1, 5))
    step = make_cost(n, items, range(n))
    shares = [own / (sum(forward) + head) for own in forward]
    run = stored_run(step, shares, below, draw.choice([0.5, 1, 2.5, 8]), steps=200, selecting=draw.randint(0, 9))
    return run, step, forward, below


@pytest.mark.parametrize("seed", range(20))
def test_a_share_of_the_steps_takes_the_time_of_its_rows_one_by_one(seed):
    """And the share that fits into a time takes this time."""
    draw = random.Random(seed)
    run, step, forward, below = random_run(draw)
    rows = 40
    for floor in range(len(below)):
        kept = run.above(floor)
        assert kept == [i for i in range(step.n) if not floor or not below[floor - 1] >> i & 1]
        every = step.of(kept) - sum(forward[:floor])
        for share in (0.1, 0.35, 0.8, 1.0):
            seen = round(share * run.epochs * rows)
            time = simulated(floor, rows, seen, forward, [0] * len(forward), 0.0) - seen * sum(forward[floor:]) / rows
            whole = run.selecting + (time + seen * every / rows) / run.epochs
            assert run.time(kept, seen / rows / run.epochs) == pytest.approx(whole, abs=1 + len(forward))
        for limit in (run.selecting + 1, run.cost.of(kept) // 2, run.cost.of(kept)):
            found = run.step_share(kept, limit)
            assert found == 0 or run.time(kept, found) == pytest.approx(limit, rel=1e-9)
        assert run.step_share(kept, run.cost.of(kept) + 5) == 1.0
        assert run.step_share(kept, run.selecting) == 0.0


@pytest.mark.parametrize("seed", range(30))
def test_the_floor_of_the_largest_fall_is_taken_and_more_time_is_never_worse(seed):
    draw = random.Random(seed)
    run, step, _, below = random_run(draw)
    sizes, least = [draw.random() for _ in range(step.n)], 0.0
    for percent in range(10, 101, 10):
        limit = max(step.of_all * percent // 100, run.selecting + 1)
        budget = RunBudget(run, limit)
        kept = budget.choose(sizes)
        every = [run.above(floor) for floor in range(len(below))]
        assert kept in every
        falls = [run.step_share(each, limit) * sum(sizes[i] for i in each) for each in every]
        assert budget.gain(kept, sizes) == max(falls) >= least
        assert budget.gain(kept, sizes) >= falls[0]  # fewer steps of all layers
        assert run.time(kept, run.step_share(kept, limit)) <= limit * (1 + 1e-9)
        assert budget.gains(sizes)[0] == falls[0] / sum(sizes)
        least = max(falls)


@pytest.mark.parametrize("epochs", [1, 3, 8])
@pytest.mark.parametrize("percent", [20, 40, 60, 80, 100])
def test_equal_scores_take_fewer_steps(epochs, percent):
    """The control: where no layer matters more than another, leaving some out never pays, whatever is stored."""
    forward = [100] * 6
    items = [Item(100, ((ANY, (2 << k) - 1),)) for k in range(6)]
    step = make_cost(6, [*items, Item(600, ((ANY, 1 << 6),))], range(6))
    run = stored_run(
        step, [own / 600 for own in forward], [(2 << k) - 1 for k in range(6)], epochs, steps=99, selecting=1
    )
    budget = RunBudget(run, step.of_all * percent // 100)
    assert budget.choose([1.0] * 6) == [*range(6)]
    one = [0.0] * 5 + [1.0]
    assert budget.gain(budget.choose(one), one) == run.step_share([5], budget.limit)  # and where one does, it pays


def test_floors_are_sixths_of_the_depth():
    assert (floors_of(6), floors_of(30), floors_of(2)) == ((1, 2, 3, 4, 5), (5, 10, 15, 20, 25), (0, 1, 1, 1, 1))
    step = make_cost(3, [Item(6, ((ANY, 8),)), *(Item(1, ((ANY, (2 << k) - 1),)) for k in range(3))], range(3))
    run = stored_run(step, [1 / 3] * 3, [1, 3, 7], 2, steps=None, selecting=0)
    # Half of 2 for each block below, and a backward pass of 1 less: 0, 1, 2, 2 and 2 blocks below (round(2.5) is 2).
    assert run.of_floors() == (9, 7, 5, 5, 5)


def test_blocks_are_timed_in_a_forward_pass_without_adapters(monkeypatch):
    """By a clock of which block k takes k + 1, and everything else 4: shares of 1/10, 2/10 and 3/10."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    clock = [0.0]
    monkeypatch.setattr(timing, "now", lambda: clock[0])

    def passes(amount):
        def tick(*_):
            clock[0] += amount

        return tick

    for k, block in enumerate(base.model.layers):
        block.self_attn.register_forward_pre_hook(passes(k + 1.0))
    base.lm_head.register_forward_pre_hook(passes(4.0))
    step = make_cost(3, [Item(1000, ((ANY, 8),)), *(Item(1, ((1 << k, 1 << k),)) for k in range(3))], range(3))
    ids = torch.ones(1, 3, dtype=torch.long)
    run = measured_run(model, lambda: [model(input_ids=ids, labels=ids).loss], step, 2.0, rounds=2)
    assert run.below == (1, 3, 7)
    assert [run.cost.of([k]) for k in range(3)] == [1001, 951, 851]  # half of 100, and of 100 and 200, in one of two
    assert run.cost.of([]) == 700


def test_sites_before_the_blocks_keep_all_of_them():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "embedding_size": 4}
    base = ElectraForSequenceClassification(ElectraConfig(num_hidden_layers=2, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["embeddings_project", "query"]))
    ids = torch.ones(1, 3, dtype=torch.long)
    step = make_cost(3, [Item(1000, ((ANY, 8),))], [0, 1, 2])
    run = measured_run(model, lambda: [model(input_ids=ids, labels=ids[0, :1]).loss], step, 2.0, rounds=1)
    assert run.below == (0b011, 0b111)
    assert run.cost.of([0]) == 1000
    with pytest.raises(OptionError, match="no list of transformers' blocks"):
        measured_run(torch.nn.Linear(2, 2), list, step, 2.0, rounds=1)
