"""FlexLoRA: the whole training against clients that own their models and a server with whole matrices; its SVD."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerState

from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.methods.flexlora import truncated
from weightlora.model.layers import lora_layers

LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], modules_to_save=["4"])
SITES, SCALE, STEPS = ("0", "2"), 3.0, 13
#: Two rounds of three turns: ⌊13·k/6⌋ for k = 1 ... 6.
ENDS, RANKS = (2, 4, 6, 8, 10, 13), (1, 2, 4)
OPTIONS = {"clients": 3, "ranks": RANKS, "rounds": 2}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step)).double()


def attached(steps=STEPS, **options):
    torch.manual_seed(1)
    method = make_method("flexlora", **{**OPTIONS, **options})
    return method, method.attach(net(), LORA, [], steps)


def nothing(_step):
    pass


def train(method, model, steps=STEPS, *, fresh=True, look=nothing, trained=nothing, note=nothing):
    """A loop of one's own around the mover, with a fresh optimizer for each turn, or with one for all."""
    mover = method.callbacks()[0].mover
    mover.before_training(steps)
    optimizer, turn = adamw(model), 0
    for step in range(1, steps + 1):
        (model(batch(step)) - 1).square().mean().backward()
        look(step)
        optimizer.step()
        trained(step)
        mover.after_step(step)
        note(step)
        optimizer.zero_grad()
        if fresh and mover.turn != turn:
            optimizer, turn = adamw(model), mover.turn


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.1)


def matrices(model):
    return {
        name: (one.lora_A["default"].weight, one.lora_B["default"].weight) for name, one in lora_layers(model).items()
    }


def updates(model):
    return {name: one.get_delta_weight("default").detach() for name, one in lora_layers(model).items()}


def largest(matrix, rank):
    """A and B of the best approximation of ``rank``."""
    u, sizes, v = torch.linalg.svd(matrix)
    return v[:rank].clone(), u[:, :rank] * sizes[:rank] / SCALE


def federated(start):
    """The paper: each client trains its own copies, the server sums whole matrices and SVDs them."""
    base, first = net().requires_grad_(False), 0
    whole = dict.fromkeys(SITES)
    head = [p.clone() for p in base[4].parameters()]
    for number in range(2):
        begin, rest = (0, *ENDS)[3 * number], (0, *ENDS)[3 * number + 3]
        total = {name: torch.zeros_like(base.get_submodule(name).weight) for name in SITES}
        heads = [torch.zeros_like(p) for p in head]
        for client, rank in enumerate(RANKS):
            last = ENDS[3 * number + client]
            mine = {
                name: (start[name][:rank].clone(), torch.zeros(len(total[name]), rank).double())
                if number == 0
                else largest(whole[name], rank)
                for name in SITES
            }
            own = [p.clone().requires_grad_() for p in head]
            trained = [m.requires_grad_() for pair in mine.values() for m in pair] + own
            optimizer = torch.optim.AdamW(trained, lr=5e-2, weight_decay=0.1)
            for step in range(first + 1, last + 1):
                x = batch(step)
                for name, (a, b) in mine.items():
                    x = torch.tanh(base.get_submodule(name)(x) + SCALE * x @ (b @ a).T)
                (x @ own[0].T + own[1] - 1).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            share = (last - first) / (rest - begin)
            total = {name: total[name] + share * SCALE * (b @ a).detach() for name, (a, b) in mine.items()}
            heads = [mean + share * p.detach() for mean, p in zip(heads, own, strict=True)]
            first = last
        whole, head = total, heads
    return {name: SCALE * b @ a for name, m in whole.items() for a, b in [largest(m, 2)]}, head


def test_the_training_is_that_of_clients_with_models_of_their_own():
    method, model = attached()
    torch.manual_seed(1)
    plain = make_method("lora").attach(net(), LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"]), [], 1)
    start = {name: a.detach() for name, (a, _) in matrices(plain).items()}
    train(method, model)
    expected, head = federated(start)
    exported = method.export(model)
    assert method.plan.ranks == {"0": 2, "2": 2}
    for name, update in updates(exported).items():
        torch.testing.assert_close(update, expected[name])
        assert update.norm() > 0.1
    mine = exported.get_base_model()[4].modules_to_save["default"].parameters()
    for one, other, start in zip(mine, head, net()[4].parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, start)


@pytest.mark.parametrize("fresh", [True, False])
def test_each_client_holds_its_rank_and_what_is_beyond_is_zero_without_gradient(fresh):
    """Old moments would move what is beyond, too."""
    method, model = attached()
    assert method.most_ranks(0) == sum(method.plan.ranks.values()) == 2 * 4, "room for the largest"
    seen, checked = {}, []

    def look(step):
        rank = RANKS[sum(step > end for end in ENDS) % 3]
        for a, b in matrices(model).values():
            assert b.grad[:, :rank].any(dim=0).all(), "A is not zero there"
            for tensor in (a[rank:], b[:, rank:], a.grad[rank:], b.grad[:, rank:]):
                assert not tensor.any()
        checked.append(rank)

    def note(step):
        seen[step] = sum(method.plan.ranks.values())
        assert seen[step] == method.most_ranks(step)

    train(method, model, fresh=fresh, look=look, note=note)
    assert checked == [1, 1, 2, 2, 4, 4, 1, 1, 2, 2, 4, 4, 4]
    assert seen == {step: 2 * rank for step, rank in enumerate([1, 2, 2, 4, 4, 1, 1, 2, 2, 4, 4, 4, 2], start=1)}


def test_one_client_gets_back_what_it_gave():
    """C = 1 with the budget's rank: the average is the client's own update, and so is what it goes on with."""
    method, model = attached(steps=6, clients=1, ranks=2, rounds=3)
    given, compared = {}, []

    def look(step):
        given[step] = updates(model)

    def note(step):
        for name, update in updates(model).items():
            torch.testing.assert_close(update, given[step][name])
            a, _ = matrices(model)[name]
            orthonormal = torch.allclose(a[:2] @ a[:2].T, torch.eye(2).double())
            compared.append((step, orthonormal, bool(update.norm() > 0.1)))

    train(method, model, steps=6, trained=look, note=note)
    # At the end of each round, and only there, the factors are those of an SVD.
    assert compared == [(step, step % 2 == 0, True) for step in range(1, 7) for _ in SITES]


def update_of_rank(rank):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(rank, 9, generator=generator, dtype=torch.double),
        torch.randn(7, rank, generator=generator, dtype=torch.double),
    )


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_what_a_rank_loses_is_the_tail_of_the_singular_values(rank):
    a, b = update_of_rank(5)
    small_a, small_b = truncated(a, b, rank)
    lost = (b @ a - small_b @ small_a).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(b @ a)[rank:].square().sum(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(small_a @ small_a.T, torch.eye(rank).double())


@pytest.mark.parametrize("rank", [3, 4, 7, 11])
def test_ranks_from_that_of_the_update_on_lose_nothing(rank):
    """The stack has more components than the update has rank, and 11 are more than the matrix has."""
    a, b = update_of_rank(3)
    doubled = torch.cat([a, a]), torch.cat([0.25 * b, 0.75 * b], dim=1)
    for mine in (truncated(a, b, rank), truncated(*doubled, rank)):
        assert [tuple(m.shape) for m in mine] == [(rank, 9), (7, rank)]
        torch.testing.assert_close(mine[1] @ mine[0], b @ a)


def test_each_turn_begins_with_a_fresh_optimizer():
    method, model = attached()
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    optimizer = adamw(model)
    remembered = {}
    for step in range(1, STEPS + 1):
        (model(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        callback.on_optimizer_step(None, TrainerState(global_step=step - 1), None, optimizer=optimizer)
        remembered[step] = len(optimizer.state)
        optimizer.zero_grad()
    assert remembered == {step: 0 if step in ENDS else 2 * 2 + 2 for step in remembered}


def test_without_its_callback_it_warns_and_cannot_be_exported():
    method, model = attached()
    with pytest.warns(WeightLoraWarning, match="flexlora is being trained, but its callback is missing"):
        (model(batch(0)) - 1).square().mean().backward()
    with pytest.raises(SelectionError, match="flexlora has finished 0 of 6 turns"):
        method.export(model)


@pytest.mark.parametrize(
    ("options", "steps", "text"),
    [
        ({"clients": 0}, 9, "clients=0 is not allowed: give a number of at least 1"),
        ({"rounds": 0}, 9, "rounds=0 is not allowed: give a number of at least 1"),
        ({"ranks": [2, 2]}, 9, r"ranks=\[2, 2\] is not allowed: give one of at least 1 for each of clients=3"),
        ({"ranks": 0}, 9, r"ranks=\[0, 0, 0\] is not allowed"),
        ({"ranks": [2, 0, 2]}, 9, r"ranks=\[2, 0, 2\] is not allowed"),
        ({"ranks": [2, 10**12, 2]}, 9, "give a number of at most 2147483647 in the place of 1000000000000"),
        ({}, 2, "2 steps are fewer than clients=3; train longer or lower clients"),
    ],
)
def test_a_value_out_of_range_is_one_line(options, steps, text):
    with pytest.raises(OptionError, match=text):
        attached(steps, **options)
