"""The gate's gradient against its closed forms <B, ∂L/∂B>/ω and <A, ∂L/∂A>/ω, and what a gate leaves alone."""

from collections import defaultdict
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, GPT2Config, GPT2LMHeadModel

from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers


def closed_forms(layers, omega):
    """∂L/∂ω from A and from B alone: both enter the loss only in the product ω·B·A."""

    def of(matrix):
        weights = [getattr(layer, matrix)["default"].weight for layer in layers.values()]
        return torch.stack([(w * w.grad).sum() for w in weights]).to(omega) / omega

    return of("lora_A"), of("lora_B")


def omegas(n):
    return torch.linspace(-0.6, 1.7, n)


def assert_gradient_is_closed_form(model, loss):
    """The definition, ∂L/∂ω = ⟨∂L/∂y, y⟩/ω at the gate's output y, and both closed forms, are one number.

    The tolerance is one fp32 rounding, 2^-24 of Σ|terms|, at each level of a tree of sums; no sum here has 2^16 terms.
    """
    layers, terms = lora_layers(model), defaultdict(list)  # a layer may be passed more than once

    def remember(name, omega):
        def hook(_module, _inputs, y):
            y.register_hook(lambda g: terms[name].append((g * y).flatten().detach() / omega))

        return hook

    with gated(layers) as gates:
        gates.write(omegas(len(layers)))
        for (name, layer), omega in zip(layers.items(), gates.omega, strict=True):
            layer.lora_A["default"].register_forward_hook(remember(name, omega))
        loss(model).backward()
        flat = [torch.cat(terms[name]) for name in gates.names]
        room = 16 * 2**-24 * torch.stack([x.abs().sum() for x in flat])
        for closed_form in (torch.stack([x.sum() for x in flat]).float(), *closed_forms(layers, gates.omega)):
            assert ((gates.gradient - closed_form).abs() <= room).all()
            # Negative control: without the division by ω the forms do not hold.
            assert ((gates.gradient - closed_form * gates.omega).abs() > room).all()


def with_random_lora(model):
    """In double precision, so that only ω itself, in fp32, is rounded; A and B are random and dropout is 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return get_peft_model(model.double(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()


@pytest.fixture
def lora_minilm(minilm):
    """The two lowest layers of MiniLM, to save time."""
    minilm.bert.encoder.layer = minilm.bert.encoder.layer[:2]
    return with_random_lora(minilm)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_gradient_is_closed_form_on_minilm(minilm, review_batches):
    model = with_random_lora(minilm)
    assert len(lora_layers(model)) == 6 * 6 + 2  # pooler and head as well
    assert_gradient_is_closed_form(model, lambda model: model(**review_batches[0]).loss)


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16, "vocab_size": 40}


def gpt2():
    """Its layers are `Conv1D`s, which hold the transposed weight."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def deberta():
    """Queries and keys pass their layer twice in a forward pass: with the tokens and with the relative positions."""
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    return DebertaV2ForMaskedLM(DebertaV2Config(**SMALL, **positions))


@pytest.mark.parametrize(("make", "count"), [(gpt2, 2 * 4), (deberta, 2 * 6 + 1)])
def test_gradient_is_closed_form_on_unusual_layers(make, count):
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=make is gpt2)
    model, tokens = get_peft_model(make().double(), config).eval(), torch.randint(4, 40, (3, 12))
    assert len(lora_layers(model)) == count
    assert_gradient_is_closed_form(model, lambda model: model(input_ids=tokens, labels=tokens).loss)


def test_gradient_is_closed_form_on_quantised_layers(quantised_net):
    model = get_peft_model(quantised_net, LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    layers = lora_layers(model).values()
    assert {type(layer).__module__ for layer in layers} == {"peft.tuners.lora.bnb"}
    assert not any(layer.get_base_layer().weight.is_floating_point() for layer in layers)
    assert_gradient_is_closed_form(model, lambda model: model(torch.randn(5, 64)).pow(2).mean())


def gradient_of(model, batches):
    """The gates' gradient of the mean loss over ``batches``, and how often each gate was passed."""
    layers, calls = lora_layers(model), []
    with gated(layers) as gates:
        handle = next(iter(layers.values())).lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
        gates.write(omegas(len(layers)))
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        handle.remove()
        gradient = gates.gradient
        model.zero_grad()
        return gradient, len(calls)


def test_gradient_is_the_same_with_gradient_checkpointing(lora_minilm, review_batches):
    plain, calls = gradient_of(lora_minilm, review_batches[:1])
    assert calls == 1
    lora_minilm.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, calls = gradient_of(lora_minilm, review_batches[:1])
    assert calls == 2  # the layers were run again in the backward pass, through the gates
    assert torch.equal(checkpointed, plain)  # the same numbers in the same order


def test_gradient_of_four_micro_batches_is_that_of_the_whole(lora_minilm, review_batches):
    batch = review_batches[0]
    pieces = [{key: tensor[i : i + 2] for key, tensor in batch.items()} for i in range(0, 8, 2)]
    whole, _ = gradient_of(lora_minilm, [batch])
    parts = torch.stack([gradient_of(lora_minilm, [piece])[0] for piece in pieces])
    accumulated, _ = gradient_of(lora_minilm, pieces)
    # Four fp32 additions of parts that may cancel, each itself a sum of such.
    room = 16 * 2**-24 * parts.abs().sum(0)
    assert ((accumulated - whole).abs() <= room).all()
    assert ((parts[0] - whole).abs() > room).all()  # negative control: one micro-batch is not the whole


def test_cleared_gradient_is_zero(lora_minilm, review_batches):
    with gated(lora_layers(lora_minilm)) as gates:
        assert not gates.gradient.any()
        lora_minilm(**review_batches[0]).loss.backward()
        assert gates.gradient.all()
        lora_minilm.zero_grad()
        assert not gates.gradient.any()


def test_gradients_of_closed_gates_add_up_until_cleared(lora_minilm, review_batches):
    with gated(lora_layers(lora_minilm)) as gates:
        gates.write(torch.zeros_like(gates.omega))
        assert not gates.gradient.any()
        lora_minilm(**review_batches[0]).loss.backward()
        once = gates.gradient
        assert once.all()
        lora_minilm(**review_batches[0]).loss.backward()
        torch.testing.assert_close(gates.gradient, 2 * once, rtol=1e-6, atol=0)
        gates.clear()
        assert not gates.gradient.any()


def test_gate_scales_the_adapter_alone(lora_minilm, review_batches):
    batch = review_batches[0]
    with lora_minilm.disable_adapter():
        base = logits(lora_minilm, batch)
    adapted = logits(lora_minilm, batch)
    with gated(lora_layers(lora_minilm)) as gates:
        assert torch.equal(logits(lora_minilm, batch), adapted)
        gates.write(torch.zeros_like(gates.omega))
        assert torch.equal(logits(lora_minilm, batch), base)
        gates.write(torch.full_like(gates.omega, 2.0))
        assert not torch.allclose(logits(lora_minilm, batch), adapted)
        gates.write(torch.ones_like(gates.omega))
        assert torch.equal(logits(lora_minilm, batch), adapted)
    assert torch.equal(logits(lora_minilm, batch), adapted)
    assert not torch.allclose(adapted, base)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_behind(lora_minilm, error):
    def hooks():
        return sum(len(module._forward_hooks) for module in lora_minilm.modules())

    before = hooks()
    layers = lora_layers(lora_minilm)
    with suppress(RuntimeError, KeyboardInterrupt), gated(layers):
        assert hooks() == before + len(layers)
        if error:
            raise error
    assert hooks() == before


def test_gates_are_no_part_of_the_model(lora_minilm):
    parameters, state = list(lora_minilm.parameters()), list(lora_minilm.state_dict())
    with gated(lora_layers(lora_minilm)) as gates:
        assert [id(p) for p in lora_minilm.parameters()] == [id(p) for p in parameters]
        assert list(lora_minilm.state_dict()) == state
        lora_minilm.bfloat16()
        assert gates.omega.dtype == torch.float32


def test_gates_stand_in_the_order_of_the_names():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))
    inject_adapter_in_model(LoraConfig(target_modules=["10", "2", "0"]), net)
    with gated(lora_layers(net)) as gates:
        gates.write(torch.tensor([1.0, 2.0, 3.0]))
        assert gates.names == ("0", "10", "2")
        assert gates.omega.tolist() == [1.0, 2.0, 3.0]
        layer = net[10].lora_A["default"]
        torch.testing.assert_close(layer(torch.ones(4)), 2 * layer.weight.sum(1))  # each ω reached its own site


def test_gate_keeps_the_activations_type():
    net = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))).bfloat16()
    with gated(lora_layers(net)):
        assert net(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_open_gate_saves_nothing_for_the_backward_pass():
    tokens, r = 100, 4
    net = inject_adapter_in_model(LoraConfig(r=r, target_modules=["0"]), nn.Sequential(nn.Linear(64, 64)))
    x = torch.ones(tokens, 64)

    def saved_numbers():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}), lambda t: t):
            y = net(x)
        return sum(sizes.values()), y

    without, _ = saved_numbers()
    assert without > tokens * r
    with gated(lora_layers(net)) as gates:
        gates.write(torch.full((1,), 0.5))
        assert saved_numbers()[0] == without
        gates.write(torch.zeros(1))
        assert saved_numbers()[0] == without + tokens * r


def test_a_closed_gate_has_a_gradient():
    """∂L/∂ω at ω = 0, where A and B have no gradient to compare with: the explicit forward pass, differentiated."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    net = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)).double())
    x, (layer,) = torch.randn(5, 4).double(), lora_layers(net).values()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    omega = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (x @ (layer.get_base_layer().weight + omega * 6 / 2 * b @ a).T + layer.get_base_layer().bias).exp().sum().backward()
    with gated({"0": layer}) as gates:
        gates.write(torch.zeros(1))
        net(x).exp().sum().backward()
        torch.testing.assert_close(gates.gradient[0], omega.grad.float())
    assert omega.grad.abs() > 1
