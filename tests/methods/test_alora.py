"""ALoRA: contributions and moves against something slow, ranks that are nowhere lost, places that are really empty."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.methods.alora import contributions, moves
from weightlora.model.layers import lora_layers
from weightlora.selection.batches import held_out

STEPS, SITES = 20, 3
LORA = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.25)
#: Rounds after steps 4, 7 and 10; room for 6 ranks at each site.
OPTIONS = {"begin": 0.2, "interval": 3, "rounds": 3}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))


def batch(step, rows=9):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step))


def loss(model, x):
    return (model(x) - 1).square().mean()


def attached(lora=LORA, loss_fn=loss, batches=None, **options):
    torch.manual_seed(1)
    method = make_method("alora", **{"loss_fn": loss_fn, **OPTIONS, **options})
    return method, method.attach(net(), lora, [batch(90 + i) for i in range(9)] if batches is None else batches, STEPS)


def nothing(_step, _model):
    pass


def train(method, model, look=nothing, note=nothing, steps=STEPS):
    """A loop of one's own around the mover."""
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.1)
    for step in range(1, steps + 1):
        loss(model, batch(step)).backward()
        callback.mover.before_step(step)
        optimizer.step()
        look(step, model)
        callback.mover.after_step(step)
        note(step, model)
        optimizer.zero_grad()
    return optimizer


def slow_scores(model, live, rows):
    """The paper's IS(j) = S(M) − S(M without j) + S(M with only j), by masks on what A returns; S is minus the loss."""

    def s(masks):
        handles = [
            layer.lora_A["default"].register_forward_hook(lambda _m, _i, output, mask=mask: output * mask)
            for layer, mask in zip(lora_layers(model).values(), masks, strict=True)
        ]
        with torch.no_grad():
            value = -float(loss(model, rows))
        for handle in handles:
            handle.remove()
        return value

    found = {}
    for i, j in live.nonzero().tolist():
        without, only = live.float(), torch.zeros(live.shape)
        without[i, j], only[i, j] = 0, 1
        found[i, j] = s(live.float()) - s(without) + s(only)
    return found


def test_the_moves_are_those_of_a_slow_reference():
    """Three go in a round, and as many come at the sites that lost none, by turns from the highest mean score."""
    method, model = attached(count=3)
    rows, seen, expected = torch.cat([batch(90 + i) for i in range(4)]), {}, {}

    def look(step, model):
        live = method.callbacks()[0].mover._live
        if step in (4, 7, 10):
            model.eval()
            scores = slow_scores(model, live, rows)
            model.train()
            ranks = live.sum(dim=1).tolist()
            for wanted in (3, 2, 1):  # fewer where there is no room
                off = sorted(scores, key=scores.get)[:wanted]
                takers = [i for i in range(SITES) if i not in {i for i, _ in off}]
                if sum(6 - ranks[i] for i in takers) >= wanted:
                    break
            mean = {i: sum(v for (k, _), v in scores.items() if k == i) / ranks[i] for i in takers}
            for i, _ in off:
                ranks[i] -= 1
            while wanted:
                for i in sorted(takers, key=mean.get, reverse=True):
                    gain = min(1, wanted, 6 - ranks[i])
                    ranks[i], wanted = ranks[i] + gain, wanted - gain
            expected[step] = ranks

    def note(step, _model):
        seen[step] = list(method.plan.ranks.values())
        assert sum(seen[step]) == SITES * 4 == method.most_ranks(step)

    train(method, model, look, note)
    assert {step: seen[step] for step in (4, 7, 10)} == expected
    assert seen[3] == [4, 4, 4]
    assert seen[10] != [4, 4, 4]
    assert seen[20] == seen[10]


def test_contributions_are_those_of_the_masks_and_leave_the_adapters_as_they_were():
    method, model = attached()
    train(method, model, steps=3)
    live, rows = method.callbacks()[0].mover._live, batch(50)
    layers = list(lora_layers(model.eval()).values())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        scores = contributions(layers, live, lambda: float(loss(model, rows)))
        whole = -float(loss(model, rows))
    slow = slow_scores(model, live, rows)
    assert {(i, j): pytest.approx(float(scores[i, j]) + whole, abs=1e-5) for i, j in slow} == slow
    assert max(slow.values()) - min(slow.values()) > 1e-2, "ranks differ by more than what is rounded"
    assert scores[~live].isinf().all()
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        contributions(layers, live, lambda: 1 / 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_eight_ranks_over_three_sites_are_three_three_and_two():
    """The paper's footnote: the sites with the highest mean take what is left over."""
    live = torch.arange(12).expand(4, -1) < 8
    scores = torch.tensor([5.0, 0.0, 7.0, 6.0])[:, None].expand(4, 12)
    off, gains = moves(scores, live, count=8)
    assert off.sum(dim=1).tolist() == [0, 8, 0, 0]
    assert gains == [2, 0, 3, 3]


def test_fewer_go_where_all_sites_would_lose_one_or_the_others_have_no_room():
    live = torch.ones(2, 3, dtype=torch.bool)
    live[:, 2] = False
    _, gains = moves(torch.tensor([[1.0, 8.0, 0.0], [2.0, 9.0, 0.0]]), live, count=2)
    assert gains == [0, 1], "the two lowest are at both sites"
    _, gains = moves(torch.tensor([[1.0, 2.0, 0.0], [8.0, 9.0, 0.0]]), live, count=2)
    assert gains == [0, 1], "there is room for one"
    off, gains = moves(torch.tensor([[1.0, 2.0], [8.0, 9.0]]), torch.ones(2, 2, dtype=torch.bool), count=2)
    assert not off.any()
    assert gains == [0, 0]


def test_a_rank_that_does_nothing_goes_first_and_no_logit_changes():
    """(a) and (c) of its three-line test: with B's columns zero, its going and a new rank's coming are not heard."""
    method, model = attached(count=2)
    logits = {}

    def look(step, model):
        if step == 4:
            (first, *_) = lora_layers(model).values()
            with torch.no_grad():
                first.lora_B["default"].weight[:, [1, 3]] = 0
                logits["before"] = model.eval()(batch(7))
                model.train()

    train(method, model, look, steps=4)
    live = method.callbacks()[0].mover._live
    assert live[0].tolist() == [True, False, True, False, False, False]
    assert live.sum(dim=1).tolist() == [2, 5, 5]
    with torch.no_grad():
        assert torch.equal(model.eval()(batch(7)), logits["before"])


def test_a_place_that_is_empty_adds_nothing_has_no_gradient_and_is_fresh_when_it_is_taken():
    method, model = attached(count=3)
    (callback,) = method.callbacks()
    before, came = {}, []

    def look(step, _model):
        before[step] = (callback.mover._live, callback.mover._used)

    def note(step, model):
        live, (was, used) = callback.mover._live, before[step]
        for i, layer in enumerate(lora_layers(model).values()):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            new = live[i] & ~was[i]
            assert not b[:, ~live[i] | new].any()
            assert not b.grad[:, ~was[i]].any()
            assert not a.grad[~was[i]].any()
            bound = a.shape[1] ** -0.5
            assert bool((a[new].abs() <= bound).all())
            assert bool((a[new].abs() > 0.3 * bound).any(dim=1).all())
            # Those that were never used come first.
            unused = int((~used[i]).sum())
            assert int((new & ~used[i]).sum()) == min(unused, int(new.sum()))
            came.extend(new.nonzero().flatten().tolist())

    optimizer = train(method, model, look, note)
    assert came
    for used, layer in zip(callback.mover._used, lora_layers(model).values(), strict=True):
        averages = optimizer.state[layer.lora_B["default"].weight]["exp_avg_sq"]
        assert (averages != 0).any(dim=0).tolist() == used.tolist()
    assert not callback.mover._used.all(), "some places were never taken"


def test_ranks_are_measured_without_dropout_and_the_modes_come_back():
    modes = []

    def watched(model, x):
        modes.append((model.training, torch.is_grad_enabled()))
        return loss(model, x)

    method, model = attached(loss_fn=watched)
    lora_layers(model)["0"].eval()
    train(method, model, steps=4)
    assert set(modes) == {(False, False)}
    assert len(modes) == 2 * SITES * 4 * 4, "each rank twice, on four batches of nine rows"
    assert model.training
    assert not lora_layers(model)["0"].training


def test_rows_are_held_out_batch_by_batch():
    taken = held_out(iter([batch(1, 4), batch(2, 7), batch(3, 4), batch(4, 4)]), 10)
    assert [len(rows) for rows in taken] == [4, 7]
    method, model = attached(batches=[batch(1, 4), batch(2, 7), batch(3, 4)], probe_rows=10)
    assert method.plan.options["probe_rows"] == 11
    with torch.no_grad():
        whole = float(loss(model.eval(), torch.cat([batch(1, 4), batch(2, 7)])))
        assert method.callbacks()[0].mover._loss() == pytest.approx(whole, rel=1e-5)
    with pytest.raises(SelectionError, match="batches is empty"):
        attached(batches=[])


def test_it_starts_as_the_base_and_ends_as_stock_lora_with_the_same_logits(tmp_path):
    method, model = attached()
    x = batch(99)
    assert torch.equal(model.eval()(x), net()(x)), "B = 0"
    train(method, model.train())
    model.eval()
    with torch.no_grad():
        before = model(x)
    exported = method.export(model).eval()
    torch.testing.assert_close(exported(x), before, atol=1e-5, rtol=1e-5)
    assert sum(method.plan.ranks.values()) == SITES * 4
    for name, layer in lora_layers(exported).items():
        assert layer.scaling["default"] == 6 / method.plan.ranks[name], (
            "one lora_alpha; B has what is left of the scale"
        )
    exported.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(net(), str(tmp_path))(x), exported(x))


def test_without_its_callback_it_warns_and_cannot_be_exported():
    method, model = attached()
    with pytest.warns(WeightLoraWarning, match="alora is being trained, but its callback is missing"):
        loss(model, batch(0)).backward()
    with pytest.raises(SelectionError, match="alora has had 0 of its 3 rounds"):
        method.export(model)


def test_a_training_that_ended_early_cannot_be_exported():
    method, model = attached()
    train(method, model, steps=8)
    with pytest.raises(SelectionError, match="alora has had 2 of its 3 rounds"):
        method.export(model)


def test_a_loss_that_is_no_number_is_an_error():
    method, model = attached(loss_fn=lambda model, x: loss(model, x) * math.nan)
    with pytest.raises(SelectionError, match="step 4: the loss of the held-out rows is not finite"):
        train(method, model, steps=4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"begin": 1.0}, "begin=1.0 is not allowed"),
        ({"interval": 0}, "interval=0 is not allowed"),
        ({"probe_rows": 0}, "probe_rows=0 is not allowed"),
        ({"max_r": 4}, "max_r=4 is not allowed: give more than r=4"),
        ({"rounds": 7}, "rounds=7 every 3 steps from step 4 on take until step 22, and the training has 20"),
        ({"lora": LoraConfig(r=4, use_rslora=True)}, "alora gives every site the same rank and alpha"),
    ],
)
def test_a_value_out_of_range_is_one_line(options, text):
    with pytest.raises(OptionError, match=text):
        attached(**options)
