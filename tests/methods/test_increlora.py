"""IncreLoRA: sensitivities, growth, reserves and the restart of the learning rate, each against something slow."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.methods.increlora import orthogonality_gradient, sensitivity, watch_backward
from weightlora.model.layers import lora_layers

STEPS, SITES = 20, 3
LORA = LoraConfig(r=4, lora_alpha=6)
#: Rounds at steps 2, 4, 6, 8 and 10: of the 9 missing ranks, ⌊9k/10⌋·2 are there after round k, and all at the last.
OPTIONS = {"begin": 0.1, "end": 0.5, "interval": 2}
RANKS = {4: 5, 6: 7, 8: 9, 10: 12}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step))


def attached(lora=LORA, base=net, **options):
    torch.manual_seed(1)
    method = make_method("increlora", **{**OPTIONS, **options})
    return method, method.attach(base(), lora, [], STEPS)


def nothing(_step, _model):
    pass


def train(method, model, look=nothing, note=nothing, steps=STEPS, learning_rate=5e-2, weight_decay=0.1):
    """A loop of one's own around the mover."""
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    for step in range(1, steps + 1):
        look(step, model)
        (model(batch(step)) - 1).square().mean().backward()
        callback.mover.before_step(step)
        optimizer.step()
        callback.mover.after_step(step)
        note(step, model)
        optimizer.zero_grad()


def deltas(model):
    return [layer.get_delta_weight("default").detach().clone() for layer in lora_layers(model).values()]


def slow_sensitivities(model, x):
    """Σ|ΔW∘∂L/∂ΔW|/√(out·in), with ΔW a leaf of autograd's graph, as in the authors' code."""
    leaves = [delta.requires_grad_() for delta in deltas(model)]
    hidden, layers = x, list(lora_layers(model).values())
    for layer, delta in zip(layers, leaves, strict=True):
        hidden = layer.base_layer(hidden) + hidden @ delta.T
        hidden = hidden if layer is layers[-1] else hidden.tanh()
    gradients = torch.autograd.grad((hidden - 1).square().mean(), leaves)
    return [float((d * g).detach().abs().sum()) / math.sqrt(d.numel()) for d, g in zip(leaves, gradients, strict=True)]


@pytest.mark.parametrize("alpha", ["keep", "scale"])
def test_the_ranks_are_those_of_a_slow_reference(alpha):
    """Whoever scores highest gains 2 of what a round has to spend; the last round has 3 and may go round twice."""
    method, model = attached(alpha=alpha)
    average, uncertainty, ranks = [0.0] * SITES, [0.0] * SITES, [1] * SITES
    heard, seen = {}, {}

    def look(step, model):
        heard[step] = slow_sensitivities(model, batch(step))

    def note(step, _model):
        for i, value in enumerate(heard[step]):
            average[i] = 0.85 * average[i] + 0.15 * value
            uncertainty[i] = 0.85 * uncertainty[i] + 0.15 * abs(value - average[i])
        mover = method.callbacks()[0].mover
        if step <= 10:
            assert mover._average.tolist() == pytest.approx(average, rel=1e-3)
            assert mover._uncertainty.tolist() == pytest.approx(uncertainty, rel=1e-3)
        left = RANKS.get(step, sum(ranks)) - sum(ranks)
        order = sorted(range(SITES), key=lambda i: -average[i] * uncertainty[i])
        while left:
            for i in order:
                gain = min(2, left, 8 - ranks[i])
                ranks[i], left = ranks[i] + gain, left - gain
        assert list(method.plan.ranks.values()) == ranks
        seen[step] = sum(ranks)

    train(method, model, look, note)
    assert seen == {1: 3, 2: 3, 3: 3, 4: 5, 5: 5, 6: 7, 7: 7, 8: 9, 9: 9, **dict.fromkeys(range(10, STEPS + 1), 12)}
    assert seen == {step: method.most_ranks(step) for step in seen}
    assert len(set(ranks)) > 1, "the sites are not alike"


def test_an_uncertain_site_grows_before_a_steady_one():
    """Nothing heard in the step: 2.55·(0.85·1 + 0.15·2.55) = 3.14 against 1.7·(0.85·2 + 0.15·1.7) = 3.32."""
    method, _ = attached()
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    averages = {"average": torch.tensor([3.0, 2.0, 0.0]), "uncertainty": torch.tensor([1.0, 2.0, 0.0])}
    callback.mover.restore({**callback.mover.state(), **averages})
    callback.mover.after_step(4)
    assert list(method.plan.ranks.values()) == [1, 3, 1]


def test_a_step_that_overflows_says_nothing():
    method, model = attached()
    mover = method.callbacks()[0].mover
    train(method, model, steps=3)
    average = mover._average.clone()
    (model(batch(4) * math.inf) - 1).square().mean().backward()
    mover.after_step(4)
    torch.testing.assert_close(mover._average, average)
    assert average.all()
    assert mover._uncertainty.isfinite().all()
    assert sum(method.plan.ranks.values()) == 5


class Heads(nn.Module):
    """Three layers side by side; the second is heard a hundred times as loud."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quiet, self.loud, self.still = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return self.quiet(x) + 100 * self.loud(x) + self.still(x)


def test_a_site_with_a_hundred_times_the_gradient_grows_in_every_round():
    """(b) of its three-line test: 1 → 3 → 5 → 7 → 8, which is all that it has room for."""
    method, model = attached(base=Heads)
    seen = {}
    train(method, model, note=lambda step, _: seen.update({step: method.plan.ranks["loud"]}))
    assert [seen[step] for step in (3, 4, 6, 8, 10, 20)] == [1, 3, 5, 7, 8, 8]


def test_what_is_not_promoted_is_as_it_should_be_and_has_no_gradient():
    """A reserve's e is 1e-5, whatever weight decay does, that of the rest 0; a and b are fresh when they come in."""
    method, model = attached(max_r=10)
    (callback,) = method.callbacks()
    arrived = 0

    def look(step, _model):
        before[step] = callback.mover._components

    def note(step, model):
        nonlocal arrived
        components = callback.mover._components
        for layer, reserved, promoted, absent, still in zip(
            lora_layers(model).values(),
            components.reserved,
            components.promoted,
            before[step].reserved < 0,
            before[step].promoted < 0,
            strict=True,
        ):
            a, b, e = layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"].flatten()
            out, waiting = reserved < 0, (reserved >= 0) & (promoted < 0)
            assert int(waiting.sum()) == (min(2, 10 - int((promoted >= 0).sum())) if step < 10 else 0)
            assert not e[out].any()
            torch.testing.assert_close(e[waiting], torch.full_like(e[waiting], 1e-5), rtol=0, atol=0)
            assert not layer.lora_E["default"].grad[still].any()
            assert not a.grad[absent].any()
            assert not b.grad[:, absent].any()
            arrived += int((reserved == step).sum())
            spread.extend(a[reserved == step].flatten().tolist())

    before, spread = {}, []
    train(method, model, look, note, weight_decay=10.0)
    assert arrived >= 6
    assert float(torch.tensor(spread).std()) == pytest.approx(0.02, rel=0.2), "decay has halved what was not there"


def test_an_optimizers_averages_of_what_is_not_there_are_zero():
    method, model = attached()
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in (1, 2, 3):
        optimizer.zero_grad()
        (model(batch(step)) - 1).square().mean().backward()
        callback.mover.before_step(step)
        optimizer.step()
        callback.mover.after_step(step)
    for layer in lora_layers(model).values():  # one rank, two reserves, five places that are empty
        a, b, e = (optimizer.state[m["default"]]["exp_avg"] for m in (layer.lora_A, layer.lora_B, layer.lora_E))
        assert (a != 0).any(dim=1).tolist() == (b != 0).any(dim=0).tolist() == [True] * 3 + [False] * 5
        assert (e.flatten() != 0).tolist() == [True] + [False] * 7


def test_what_a_round_adds_starts_with_small_steps():
    """Grown at step 4 with restart=4: a quarter of the optimizer's step at step 5, all of it at step 8."""
    method, model = attached(restart=4, orth_reg_weight=0.0)
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    paces = {}
    for step in range(1, 9):
        optimizer.zero_grad()
        (model(batch(step)) - 1).square().mean().backward()
        callback.mover.before_step(step)
        promoted = callback.mover._components.promoted.clone()
        before = [layer.lora_E["default"].detach().clone() for layer in lora_layers(model).values()]
        optimizer.step()
        callback.mover.after_step(step)
        for layer, old, since in zip(lora_layers(model).values(), before, promoted, strict=True):
            e = layer.lora_E["default"]
            for j in (since == 4).nonzero().flatten():
                moved, whole = e.detach()[j] - old[j], -0.1 * e.grad[j]
                paces.setdefault(step, []).append(float(moved / whole))
            first = (since == 0).nonzero().flatten()
            torch.testing.assert_close(e.detach()[first] - old[first], -0.1 * e.grad[first], atol=1e-7, rtol=1e-3)
    assert {step: pytest.approx(values, rel=1e-2) for step, values in paces.items()} == {
        step: [(step - 4) / 4] * 2 for step in (5, 6, 7, 8)
    }


def test_the_sensitivity_needs_no_whole_matrix():
    """600 rows of 4096 are three blocks; x is what A was given, behind the dropout."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.5)
    method, model = attached(lora, lambda: nn.Sequential(nn.Linear(4096, 600)))
    method.callbacks()[0].mover.before_training(STEPS)
    (layer,) = lora_layers(model).values()
    heard = []
    handles = watch_backward(layer, lambda x, g: heard.append((x, g)))
    model.train()(torch.randn(2, 3, 4096)).square().mean().backward()
    ((x, g),) = heard
    whole = g.flatten(0, 1).T @ x.flatten(0, 1)
    delta = layer.get_delta_weight("default").detach()
    expected = (delta * whole).abs().sum() / math.sqrt(4096 * 600)
    torch.testing.assert_close(sensitivity(layer, x, g), expected, rtol=1e-4, atol=0)
    # What autograd says of the one e that is promoted agrees with G: ∂L/∂e_j = s·⟨b_j, G·a_j⟩.
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
    heard_by_e = layer.lora_E["default"].grad.flatten()
    torch.testing.assert_close(heard_by_e[:1], scale * (b[:, 0] @ whole @ a[0][:, None]), rtol=1e-4, atol=0)
    for handle in handles:
        handle.remove()


def test_the_penaltys_gradient_is_autograds():
    """λ/(2n)·Σ‖A·Aᵀ − I‖ + ‖Bᵀ·B − I‖ over what is there: the first component and its two reserves."""
    method, model = attached(orth_reg_weight=0.7)
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    pairs = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in lora_layers(model).values()]
    rest = [m @ m.T - torch.eye(3) for a, b in pairs for m in (a[:3], b.T[:3])]
    matrices = [matrix for pair in pairs for matrix in pair]
    expected = torch.autograd.grad(0.7 / (2 * SITES) * sum(matrix.norm() for matrix in rest), matrices)
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    callback.mover.before_step(1)
    for matrix, gradient in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.grad, gradient)
        assert gradient.any()
    assert not orthogonality_gradient(torch.eye(3)).any(), "nothing pulls at what is orthogonal"


@pytest.mark.parametrize("alpha", ["keep", "scale"])
def test_it_starts_as_the_base_and_ends_as_stock_lora_with_the_same_logits(tmp_path, alpha):
    """(c) of its three-line test; the reserves at the start add 1e-5 of next to nothing."""
    method, model = attached(alpha=alpha)
    x = batch(99)
    torch.testing.assert_close(model.eval()(x), net()(x), atol=1e-6, rtol=0)
    train(method, model.train())
    with torch.no_grad():
        before = model(x)
    components = method.callbacks()[0].mover._components
    for layer, promoted in zip(lora_layers(model).values(), components.promoted, strict=True):
        with torch.no_grad():
            layer.lora_E["default"][promoted < 0] = 0
    assert torch.equal(model(x), before), "the reserves are gone"
    exported = method.export(model)
    torch.testing.assert_close(exported(x), before, atol=1e-5, rtol=1e-5)
    assert sum(method.plan.ranks.values()) == 12
    for name, layer in lora_layers(exported).items():
        assert layer.scaling["default"] == 6 / method.plan.ranks[name], (
            "one lora_alpha; B has what is left of the scale"
        )
    exported.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(net(), str(tmp_path))(x), exported(x))


def test_without_its_callback_it_warns_and_cannot_be_exported():
    method, model = attached()
    with pytest.warns(WeightLoraWarning, match="increlora is being trained, but its callback is missing"):
        (model(batch(0)) - 1).square().mean().backward()
    with pytest.raises(SelectionError, match="increlora has grown to 3 ranks, 12 are the budget"):
        method.export(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"begin": 0.5}, "begin=0.5 and end=0.5 are not allowed"),
        ({"interval": 0}, "interval=0 is not allowed"),
        ({"count": 0}, "count=0 is not allowed"),
        ({"beta2": 1.0}, "beta2=1.0 is not allowed"),
        ({"max_r": 4}, "max_r=4 is not allowed: give more than r=4"),
        ({"alpha": "x"}, "alpha='x' is not allowed"),
        ({"begin": 0.3, "end": 0.34}, "20 steps leave none between begin=0.3 and end=0.34"),
        ({"lora": LoraConfig(r=1)}, "r=1 leaves nothing to grow"),
    ],
)
def test_a_value_out_of_range_is_one_line(options, text):
    with pytest.raises(OptionError, match=text):
        attached(**options)
