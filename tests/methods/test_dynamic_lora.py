"""Dynamic LoRA: shares, curve, penalty and resumption, each against something slow."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.methods.dynamic_lora import shares
from weightlora.model.layers import lora_layers

STEPS, SITES = 20, 3
LORA = LoraConfig(r=2, lora_alpha=6)
OPTIONS = {"init_r": 4, "interval": 2}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step))


def attached(steps=STEPS, **options):
    torch.manual_seed(1)
    method = make_method("dynamic_lora", **{**OPTIONS, **options})
    return method, method.attach(net(), LORA, [], steps)


def nothing(_step, _model):
    pass


def train(method, model, look=nothing, note=nothing):
    """A loop of one's own around the mover."""
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(1, STEPS + 1):
        (model(batch(step)) - 1).square().mean().backward()
        callback.mover.before_step(step)
        optimizer.step()
        look(step, model)
        callback.mover.after_step(step)
        note(step, model)
        optimizer.zero_grad()


def slow_shares(layer):
    """The paper's: the norm of each component's own update over the norm of their sum."""
    a, b, c = (m["default"].detach() for m in (layer.lora_A, layer.lora_B, layer.lora_E))
    components = [float(c[j]) * torch.outer(b[:, j], a[j]) for j in range(len(a))]
    return [float(component.norm() / (sum(components).norm() + 1e-8)) for component in components]


def test_the_ranks_are_those_of_a_slow_reference():
    """Window: steps 3 (0.15·20) to 10 (7 = 0.35·20 later), pruning at 3, 5, 7, 9 and 10; shares averaged with 0.9."""
    method, model = attached()
    average, seen, compared = {}, {}, []

    def look(_step, model):  # before the mover, which changes what there is to see
        for name, layer in lora_layers(model).items():
            old = average.get(name, [0.0] * 4)
            average[name] = [0.9 * a + 0.1 * b for a, b in zip(old, slow_shares(layer), strict=True)]

    def note(step, _model):
        seen[step] = sum(method.plan.ranks.values())
        if step in (3, 5, 7, 9, 10):
            count = max(1, int(6 * ((step - 3) / 7) ** 3))
            order = sorted((share, name) for name, values in average.items() for share in values)
            off = [name for _, name in order[:count]]
            assert method.plan.ranks == {name: 4 - off.count(name) for name in average}
            compared.append(step)

    train(method, model, look, note)
    assert compared == [3, 5, 7, 9, 10]
    pruned = {3: 11, 5: 11, 7: 11, 9: 12 - int(6 * (6 / 7) ** 3)}
    assert seen == {**dict.fromkeys((1, 2, 4, 6, 8), 12), **pruned, **dict.fromkeys(range(10, STEPS + 1), 6)}
    assert seen == {step: method.most_ranks(step) for step in range(1, STEPS + 1)}


def test_halfway_an_eighth_of_what_is_to_go_is_gone():
    """100 steps with a window from 20 to 60: of 64 components that are to go, 8 are gone at step 40."""
    method = make_method("dynamic_lora", init_r=128, interval=1, begin=0.2, end=0.6)
    method.attach(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=64), [], 100)
    assert [method.most_ranks(step) for step in (19, 20, 40, 60, 100)] == [128, 127, 120, 64, 64]


def test_shares_need_no_whole_matrix():
    _, model = attached()
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_E["default"].normal_()
        assert shares(layer).tolist() == pytest.approx(slow_shares(layer), rel=1e-4)


def test_the_penaltys_gradient_is_autograds():
    method, model = attached(variance_weight=0.7)
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    layers = lora_layers(model)
    matrices = [(layer.lora_A["default"], 1) for layer in layers.values()]
    matrices += [(layer.lora_B["default"], 0) for layer in layers.values()]
    penalty = 0.7 / (2 * SITES * 4) * sum(matrix.var(dim=dim).sum() for matrix, dim in matrices)
    expected = torch.autograd.grad(penalty, [matrix for matrix, _ in matrices])
    for step, there in ((1, True), (11, False)):
        for matrix, _ in matrices:
            matrix.grad = torch.zeros_like(matrix)
        callback.mover.before_step(step)
        for (matrix, _), gradient in zip(matrices, expected, strict=True):
            torch.testing.assert_close(matrix.grad, gradient if there else torch.zeros_like(gradient))


def test_it_starts_as_the_base_and_ends_as_stock_lora_with_the_same_logits(tmp_path):
    method, model = attached()
    x = batch(99)
    assert torch.equal(model.eval()(x), net()(x)), "c = 0"
    train(method, model.train())
    with torch.no_grad():
        before = model(x)
    exported = method.export(model)
    torch.testing.assert_close(exported(x), before, atol=1e-5, rtol=1e-5)
    assert sum(method.plan.ranks.values()) == SITES * 2
    exported.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(net(), str(tmp_path))(x), exported(x))


def test_without_its_callback_it_warns_and_cannot_be_exported():
    method, model = attached()
    with pytest.warns(WeightLoraWarning, match="dynamic_lora is being trained, but its callback is missing"):
        (model(batch(0)) - 1).square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    with pytest.raises(SelectionError, match="dynamic_lora has 12 ranks left, 6 are the budget"):
        method.export(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"begin": 0.5}, "begin=0.5 and end=0.5 are not allowed"),
        ({"interval": 0}, "interval=0 is not allowed"),
        ({"beta": 1.0}, "beta=1.0 is not allowed"),
        ({"init_r": 2}, "init_r=2 is not allowed: give more than r=2"),
        ({"alpha": "x"}, "alpha='x' is not allowed"),
        ({"begin": 0.3, "end": 0.34}, "20 steps leave none between begin=0.3 and end=0.34"),
    ],
)
def test_a_value_out_of_range_is_one_line(options, text):
    with pytest.raises(OptionError, match=text):
        attached(**options)
