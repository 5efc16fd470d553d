"""Methods that keep all sites and change what is trained there: mini adapters, preconditioned gradients."""

import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.model.layers import lora_layers

LORA = LoraConfig(r=4, lora_alpha=6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def batch(step):
    return torch.randn(9, 8, generator=torch.Generator().manual_seed(step))


def backward(model, step):
    (model(batch(step)) - 1).square().mean().backward()


def trained(model, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.1)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model


# -- melora ----------------------------------------------------------------------------------------------------------


def mini_output(x, a, b, n, scale):
    """The paper's forward pass: N adapters, each on its own piece of x, their outputs one after the other."""
    (rows, inputs), outputs = a.shape, b.shape[0]
    pieces = []
    for k in range(n):
        mini_a = a[k * rows // n : (k + 1) * rows // n, k * inputs // n : (k + 1) * inputs // n]
        mini_b = b[k * outputs // n : (k + 1) * outputs // n, k * rows // n : (k + 1) * rows // n]
        pieces.append(x[:, k * inputs // n : (k + 1) * inputs // n] @ mini_a.T @ mini_b.T * scale)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_after_training_there_are_n_mini_adapters_and_nothing_between_them(n):
    method = make_method("melora", n_mini=n)
    model = trained(method.attach(net(), LORA, [], 5))
    layer = lora_layers(method.export(model))["0"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = batch(9)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), mini_output(x, a, b, n, scale=6 / 4))
    moved = int((a != 0).sum() + (b != 0).sum())
    assert moved == 4 * (8 + 12) // n, "r·(in + out)/N numbers are trained"
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default").detach()) == 4, "the rank is that of one adapter"
    assert method.plan.ranks == {"0": 4, "2": 4}


def test_a_mini_adapter_starts_as_one_with_fewer_inputs_would():
    torch.manual_seed(1)
    model = make_method("melora", n_mini=4).attach(nn.Sequential(nn.Linear(4000, 8)), LORA, [], 5)
    a = lora_layers(model)["0"].lora_A["default"].weight
    bound = (1 / 1000) ** 0.5  # Kaiming with a = √5 on 1000 inputs
    assert 0.95 * bound < float(a.abs().max()) <= bound


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(OptionError, match="n_mini=3 does not divide r=4 of 0; choose one that does"):
        make_method("melora", n_mini=3).attach(net(), LORA, [], 5)
    with pytest.raises(OptionError, match="n_mini=4 does not divide out_features=6 of 0"):
        make_method("melora").attach(nn.Sequential(nn.Linear(8, 6)), LORA, [], 5)


# -- riemannian ------------------------------------------------------------------------------------------------------


def attached():
    torch.manual_seed(1)
    method = make_method("riemannian", reg=0.1)
    return method, method.attach(net(), LORA, [], 5)


def test_the_steps_are_those_of_pefts_optimizer():
    (idle, theirs), (method, ours) = attached(), attached()
    for each in (idle, method):
        each.callbacks()[0].mover.before_training(5)
    plain, own = (
        trained(attached_plain()),
        torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=5e-2),
    )
    other = create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=5e-2, reg=0.1)
    for step in range(1, 6):
        for model, optimizer in ((theirs, other), (ours, own)):
            backward(model, step)
            if model is ours:
                method.callbacks()[0].mover.before_step(step)
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), (_, two) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    assert not torch.allclose(ours(batch(9)), plain(batch(9)), atol=1e-3), "plain AdamW goes elsewhere"
    assert method.export(ours) is ours


def attached_plain():
    torch.manual_seed(1)
    return make_method("lora").attach(net(), LORA, [], 5)


def test_without_the_callback_it_is_plain_lora_and_says_so():
    method, model = attached()
    with pytest.warns(WeightLoraWarning, match="riemannian is being trained, but its callback is missing"):
        trained(model)
    with pytest.raises(SelectionError, match="this is plain LoRA: riemannian's callback did not run"):
        method.export(model)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [("melora", {"n_mini": 0}, "n_mini=0 is not allowed"), ("riemannian", {"reg": 0.0}, "reg=0.0 is not allowed")],
)
def test_a_value_out_of_range_is_one_line(name, options, text):
    with pytest.raises(OptionError, match=text):
        make_method(name, **options)
