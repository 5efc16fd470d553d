"""PrunedLoRA: costs and compensation against brute force, the sequence of ranks, zeros that stay zeros."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from weightlora.errors import OptionError, SelectionError
from weightlora.methods import make_method
from weightlora.methods.pruned_lora import compensation, removal_cost
from weightlora.model.layers import lora_layers

STEPS = 8
LORA = LoraConfig(r=2, lora_alpha=6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step))


def attached(**options):
    torch.manual_seed(1)
    method = make_method("pruned_lora", **{"init_r": 7, "interval": 2, **options})
    return method, method.attach(net(), LORA, [], STEPS)


def train(method, model, steps=STEPS, note=id):
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(1, steps + 1):
        (model(batch(step)) - 1).square().mean().backward()
        callback.mover.before_step(step)
        optimizer.step()
        callback.mover.after_step(step)
        note(step)
        optimizer.zero_grad()


def quadratic(d, gradient, h):
    return (gradient * d).sum() + 0.5 * torch.trace(d @ h @ d.T)


def brute_force(x, gradient, h, off, start):
    """The least of the quadratic under D_S = −X_S, by Newton's method on the free columns alone."""
    free = [j for j in range(x.shape[1]) if j not in off]
    d = torch.zeros_like(x)
    d[:, off] = -x[:, off]
    # ∂/∂D_free: start·G_free + D_free·H_ff + D_off·H_of = 0
    right = -(start * gradient[:, free] + d[:, off] @ h[off][:, free])
    d[:, free] = torch.linalg.solve(h[free][:, free], right, left=False)
    return d


def problem():
    generator = torch.Generator().manual_seed(2)
    x, gradient = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, gradient, gradient.T @ gradient + 0.3 * torch.eye(4, dtype=torch.float64)


def test_a_removals_cost_is_the_rise_of_the_constrained_quadratic():
    x, gradient, h = problem()
    lowest = quadratic(-gradient @ torch.linalg.inv(h), gradient, h)
    rises = [quadratic(brute_force(x, gradient, h, [j], 1.0), gradient, h) - lowest for j in range(4)]
    torch.testing.assert_close(removal_cost(x, gradient, torch.linalg.inv(h)), torch.stack(rises))


def test_the_compensation_is_the_cheapest_move_that_empties_the_columns():
    x, gradient, h = problem()
    off = torch.tensor([1, 3])
    d = compensation(x, torch.linalg.inv(h), off)
    torch.testing.assert_close(d, brute_force(x, gradient, h, [1, 3], 0.0))
    torch.testing.assert_close(d[:, off], -x[:, off])
    idle = torch.zeros_like(x)
    idle[:, off] = -x[:, off]
    assert quadratic(d, 0 * gradient, h) < quadratic(idle, 0 * gradient, h), "taking away alone is dearer"


@pytest.mark.parametrize("recover", ["none", "eta"])
def test_ranks_fall_by_two_and_stop_at_the_target_and_zeros_stay(recover):
    """7 → 5 at step 3, 3 at step 5, 2 (not 1) at step 7."""
    method, model = attached(recover=recover)
    seen = {}

    def note(step):
        for name, layer in lora_layers(model).items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            live = (a != 0).any(dim=1) & (b != 0).any(dim=0)
            assert int(live.sum()) == method.plan.ranks[name]
            assert not a[~live].any()
            assert not b[:, ~live].any()
            assert set(live.nonzero().flatten().tolist()) <= alive.setdefault(name, set(range(7)))
            alive[name] = set(live.nonzero().flatten().tolist())
        seen[step] = sum(method.plan.ranks.values())

    alive = {}
    train(method, model, note=note)
    assert seen == {1: 14, 2: 14, 3: 10, 4: 10, 5: 6, 6: 6, 7: 4, 8: 4}
    assert seen == {step: method.most_ranks(step) for step in range(1, STEPS + 1)}


def test_the_export_is_stock_lora_with_the_same_logits_and_strength(tmp_path):
    method, model = attached()
    train(method, model)
    x = batch(9)
    before = model(x)
    exported = method.export(model)
    torch.testing.assert_close(exported(x), before)
    assert {layer.scaling["default"] for layer in lora_layers(exported).values()} == {3.0}
    assert method.plan.ranks == {"0": 2, "2": 2}
    exported.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(net(), str(tmp_path))(x), exported(x))


def test_a_component_that_does_nothing_goes_first():
    """(b) of its three-line test: B's column is zero and has no gradient, A's row the same."""
    method, model = attached(count=1, init_r=3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
            layer.lora_B["default"].weight[:, 1] = 0
            layer.lora_A["default"].weight[1] = 0
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    (model(batch(1)) - 1).square().mean().backward()
    callback.mover.before_step(3)
    assert [mask.tolist() for mask in method._masks.values()] == [[True, False, True]] * 2


def test_a_training_that_ended_early_cannot_be_exported():
    method, model = attached()
    train(method, model, steps=4)
    with pytest.raises(SelectionError, match="pruned_lora has 10 ranks left, 4 are the budget"):
        method.export(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_r": 2}, "init_r=2 is not allowed: give more than r=2"),
        ({"interval": 3}, "from init_r=7 to r=2 by 2 every 3 steps takes 10 steps, and the training has 8"),
        ({"count": 0}, "count=0 is not allowed"),
        ({"recover": "all"}, "recover='all' is not allowed: give 'none' or 'eta'"),
        ({"damping": 0.0}, "damping=0.0 is not allowed"),
    ],
)
def test_a_value_out_of_range_is_one_line(options, text):
    with pytest.raises(OptionError, match=text):
        attached(**options)
