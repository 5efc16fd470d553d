"""Which products go to oneDNN, and that they are the same numbers."""

import time
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from weightlora import enable_fast_lora, onednn

LARGE = 336  # 336³ is more than 2²⁵, 320³ is less


@pytest.fixture
def quicker_here(monkeypatch):
    """As on the processors that oneDNN is for."""
    monkeypatch.setattr(onednn, "is_quicker", lambda _: True)


class Count(TorchDispatchMode):
    """Counts the products that oneDNN is asked for."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "mkldnn"
        return func(*args, **(kwargs or {}))


def products(left, right, **options):
    with Count() as count:
        onednn.product(left, right, **options)
    return count.calls


def test_this_torch_has_the_operator():
    """It is private to torch: the day that it is gone, all products are torch's, and nobody would notice."""
    assert torch.backends.mkldnn.is_available() == (onednn._linear() is not None)


@pytest.mark.parametrize(("seconds", "quicker"), [(0.0, True), (0.1, False)])
def test_the_quicker_one_wins(seconds, quicker, monkeypatch):
    """Against torch's 2·256·384·1536 multiplications, some milliseconds: one that computes nothing, one that sleeps."""
    sleeper = SimpleNamespace(default=lambda *_: time.sleep(seconds))
    monkeypatch.setattr(onednn, "_linear", lambda: sleeper)
    assert onednn.is_quicker.__wrapped__(1) == quicker


def test_without_the_operator_there_is_no_race(monkeypatch):
    monkeypatch.setattr(onednn, "_linear", lambda: None)
    assert not onednn.is_quicker.__wrapped__(1)


@pytest.mark.usefixtures("quicker_here")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "strided"])
def test_products_are_right(transposed, biased, layout):
    """A sum of k products in float32 is off by at most k·2⁻²⁴ of the sum of their sizes; bf16 by much more."""
    torch.manual_seed(0)
    left, right = torch.randn(LARGE, LARGE), torch.randn(LARGE, LARGE)
    if layout == "expanded":
        left = left[:1].expand(LARGE, LARGE)
    elif layout == "strided":
        left = torch.randn(LARGE, 2 * LARGE)[:, ::2]
    right = right.t() if transposed else right
    bias = torch.randn(LARGE) if biased else None
    assert products(left, right, bias=bias) == 1
    exact = left.double() @ right.double() + (bias.double() if biased else 0)
    room = (LARGE + 1) * 2**-24 * (left.double().abs() @ right.double().abs() + (bias.double().abs() if biased else 0))
    assert ((onednn.product(left, right, bias) - exact).abs() <= room).all()
    assert not ((left.bfloat16() @ right.bfloat16() - exact).abs() <= room).all()


@pytest.mark.usefixtures("quicker_here")
def test_what_is_left_to_torch(monkeypatch):
    large, small = torch.ones(LARGE, LARGE), torch.ones(320, 320)
    assert products(large, large) == 1
    assert products(small, small) == 0
    assert products(large.double(), large.double()) == 0
    assert products(large.bfloat16(), large.bfloat16()) == 0
    with torch.backends.mkldnn.flags(enabled=False):  # the user's own switch
        assert products(large, large) == 0
    with FakeTensorMode() as mode:
        assert not onednn.takes(mode.from_tensor(large), large)
    torch.use_deterministic_algorithms(True)
    try:
        assert products(large, large) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert products(large, large) == 1
    monkeypatch.setattr(onednn, "is_quicker", lambda _: False)
    assert products(large, large, bias=torch.ones(LARGE)) == 0
    torch.testing.assert_close(onednn.product(large, large, torch.ones(LARGE))[0, 0], torch.tensor(LARGE + 1.0))


@pytest.mark.usefixtures("quicker_here")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_asks_it_once_each_way(p):
    """Its own product forwards, its gradient backwards; PEFT's way asks for none, nor does a base that is watched."""
    net = nn.Sequential(nn.Linear(LARGE, LARGE))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], lora_dropout=p))
    x = torch.ones(LARGE, LARGE, requires_grad=True)

    def calls():
        with Count() as forward:
            y = model(x)
        with Count() as backward:
            y.sum().backward()
        return forward.calls, backward.calls

    assert calls() == (0, 0)
    enable_fast_lora(model)
    assert calls() == (1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls()[0] == 0
    handle = net[0].base_layer.register_forward_hook(lambda *_: None)
    assert calls() == (0, 0)
    handle.remove()
    assert calls() == (1, 1)
