"""A model may change the output of a projection in place: the fast step's output is no view."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import Llama4ForCausalLM, Llama4TextConfig, OlmoConfig, OlmoForCausalLM
from transformers.pytorch_utils import Conv1D

from weightlora.fast import enable as fast_layer
from weightlora.fast.enable import enable_fast_lora
from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers

CHANGES = {
    "clamp_": lambda y, _x: y.clamp_(-1, 1),
    "relu_": lambda y, _x: functional.relu(y, inplace=True),
    "+= x": lambda y, x: y.add_(x),
    "part of it": lambda y, _x: y[..., 1:].mul_(3),
    "reshaped": lambda y, _x: y.view(-1).clamp_(-1, 1),
}


@pytest.fixture(autouse=True)
def _no_call_is_small(monkeypatch):
    monkeypatch.setattr(fast_layer, "_is_small", lambda *_, **__: False)


class Changed(nn.Module):
    """A projection whose output is changed in place; ``slope`` is trained before it."""

    def __init__(self, projection, change):
        super().__init__()
        self.projection, self.change, self.slope = projection, change, nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = x * self.slope
        y = self.projection(x)
        self.change(y, x)
        return y


def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, loss, count, room=1e-12):
    """Stock PEFT's gradients, in the Euclidean norm of all together; float64 rounds by 2^-53 = 1.1e-16."""
    stock, ours = gradients(model, loss), gradients(enable_fast_lora(deepcopy(model)), loss)
    assert ours.keys() == stock.keys()
    assert len(ours) == count
    flat, flat_ = (torch.cat([g.flatten().double() for g in found.values()]) for found in (ours, stock))
    assert (flat - flat_).norm() < room * flat_.norm()


def with_lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options)).train()


@pytest.mark.sampled(60)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D", "trained base"])
@pytest.mark.parametrize("omega", [None, 0.7, 0.0])
def test_any_change_of_a_projections_output(change, shape, kind, omega):
    """With an open and a closed gate as well. torch returns a view from a layer with bias and three dimensions."""
    torch.manual_seed(0)
    projection = Conv1D(8, 8) if kind == "Conv1D" else nn.Linear(8, 8, bias=kind != "no bias")
    model = with_lora(Changed(projection, change), target_modules=["projection"], fan_in_fan_out=kind == "Conv1D")
    model.double().get_base_model().slope.requires_grad_()
    if kind == "trained base":
        model.requires_grad_(True)
    x = torch.randn(shape, dtype=torch.float64)

    def loss(model):
        if omega is None:
            return model(x).pow(2).sum()
        with gated(lora_layers(model)) as gates:
            gates.write(torch.tensor([omega]))
            return model(x).pow(2).sum()

    assert_same_gradients(model, loss, count=5 if kind == "trained base" else 3)  # A, B, slope; W0 and its bias


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_quantised(quantised_net, change, dims):
    net = nn.Sequential(Changed(quantised_net[0], change))
    for name, flag in vars(quantised_net).items():
        if name.startswith("is_loaded_in_"):
            setattr(net, name, flag)
    x = torch.randn(5, 64) if dims == 2 else torch.randn(2, 5, 64)
    model = with_lora(net, target_modules=["0.projection"])
    assert_same_gradients(model, lambda model: model(x).pow(2).mean(), count=2, room=1e-5)


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def olmo():
    """Clamps q, k and v in place."""
    return OlmoForCausalLM(OlmoConfig(**SMALL, clip_qkv=0.05)), ["q_proj", "k_proj", "v_proj"]


def llama4():
    """Adds the experts to the output of the shared expert's ``down_proj`` in place."""
    small = {"intermediate_size_mlp": 32, "num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 8}
    return Llama4ForCausalLM(Llama4TextConfig(**SMALL, **small)), ["up_proj", "gate_proj", "down_proj"]


@pytest.mark.parametrize("family", [olmo, llama4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_families_that_do(family, checkpointing):
    torch.manual_seed(0)
    net, names = family()
    model = with_lora(net, target_modules=names).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(2, 50, (2, 12))
    assert_same_gradients(model, lambda model: model(input_ids=ids, labels=ids).loss, count=4 * len(names))
