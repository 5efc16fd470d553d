"""The fast step against stock PEFT: numbers, gradients, saved bytes, dropout, what falls back, what is left behind."""

import math
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import weightlora
from weightlora.errors import OptionError, SiteError, WeightLoraWarning
from weightlora.fast import enable as fast_layer
from weightlora.fast.enable import FastLora, disable_fast_lora, enable_fast_lora, fast_coverage
from weightlora.fast.step import drop, unpack, zeroed
from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers

IS_SMALL = fast_layer._is_small
NAMES = r".*\.layer\.\d+\..*(query|key|value|dense)"


@pytest.fixture(autouse=True)
def _no_call_is_small(monkeypatch):
    monkeypatch.setattr(fast_layer, "_is_small", lambda *_, **__: False)


def with_lora(net, **options):
    """Random A and B, so that nothing is hidden by B = 0."""
    torch.manual_seed(1)
    return get_peft_model(net, LoraConfig(**{"r": 4, "lora_alpha": 12, "init_lora_weights": False, **options}))


@pytest.fixture
def lora_minilm(minilm):
    """The two lowest layers of MiniLM without its own dropout."""
    minilm.bert.encoder.layer = minilm.bert.encoder.layer[:2]
    for module in minilm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return with_lora(minilm, target_modules=NAMES)


def outcome(model, run):
    """Output and every gradient of one pass."""
    model.zero_grad()
    output = run(model)
    output.float().pow(2).mean().backward()
    return output.detach().clone(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(ours, theirs):
    """Relative to the whole, in the Euclidean norm: output, then all gradients as one vector."""
    (y, gradients), (y_, gradients_) = ours, theirs
    assert gradients.keys() == gradients_.keys()
    flat, flat_ = (torch.cat([g.flatten().double() for g in d.values()]) for d in (gradients, gradients_))
    assert flat_.norm() > 0
    return max(float((y - y_).double().norm() / y_.double().norm()), float((flat - flat_).norm() / flat_.norm()))


def assert_same(model, run, room=1e-5):
    """Fast and stock agree; a wrong scale does not."""
    stock = outcome(model, run)
    enable_fast_lora(model)
    assert distance(outcome(model, run), stock) < room
    for layer in lora_layers(model).values():
        layer.scaling["default"] *= 1 + 100 * room
    assert distance(outcome(model, run), stock) > room
    for layer in lora_layers(model).values():
        layer.scaling["default"] /= 1 + 100 * room
    disable_fast_lora(model)
    assert distance(outcome(model, run), stock) == 0


def logits(batch):
    return lambda model: model(**batch).logits


# -- the same numbers ------------------------------------------------------------------------------------------------


def test_minilm(lora_minilm, review_batches):
    assert_same(lora_minilm, logits(review_batches[0]))
    assert_same(lora_minilm.double(), logits(review_batches[0]), room=1e-12)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def test_conv1d():
    model = with_lora(gpt2().eval(), target_modules="all-linear", fan_in_fan_out=True)
    assert_same(model, logits({"input_ids": torch.randint(40, (3, 12))}))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"0": 7}, "alpha_pattern": {"2": 3}}])
@pytest.mark.parametrize("bias", [True, False])
def test_scales_ranks_and_bias(options, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 5, bias=bias))
    x = torch.randn(2, 3, 8)
    assert_same(with_lora(net, target_modules=["0", "2"], **options), lambda model: model(x))


@pytest.mark.parametrize("tokens", [9, 10, 11, 12, 15, 16, 40])
@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_few_and_many_tokens(tokens, dtype, room):
    """With twice as many tokens as outputs or more, dL/dx is one product with W0 + s·B·A."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    x = torch.randn(tokens, 8, dtype=dtype)
    model = with_lora(net, target_modules=["0", "2"], lora_dropout=0.3, use_rslora=True).to(dtype).eval()
    assert_same(model, lambda model: model(x), room=room)


def test_an_adapter_added_later_is_pefts_until_it_is_enabled():
    model = enable_fast_lora(with_lora(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"]))
    model.add_adapter("late", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("late")
    x, layer = torch.randn(3, 8), lora_layers(model)["0"]
    assert "late" not in layer.lora_variant
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ layer.get_delta_weight("late").t())
    enable_fast_lora(model)
    assert isinstance(layer.lora_variant["late"], FastLora)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0, 8), (2, 3, 8)])
@pytest.mark.parametrize("kind", ["input", "rank"])
def test_shapes_that_a_linear_layer_takes(shape, kind):
    """One token without a batch, and an expert that no token is sent to, among them."""
    model = with_lora(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], lora_dropout=0.3)
    fast, x = enable_fast_lora(deepcopy(model), dropout=kind), torch.randn(shape, requires_grad=True)
    assert fast(x).shape == model(x).shape
    fast(x).sum().backward()
    assert x.grad.shape == x.shape
    torch.testing.assert_close(fast.eval()(x), model.eval()(x))


def test_half_precision_does_not_swallow_the_adapter():
    """W0 = (1, 1), B·A = (2^-10, 0), dL/dy = (1, -1): dL/dx = 2^-10; bf16 has nothing between 1 and 1 + 2^-7."""
    model = with_lora(nn.Sequential(nn.Linear(1, 2)), target_modules=["0"], r=1, lora_alpha=1).bfloat16()
    layer = lora_layers(model)["0"]
    for weight, values in ((layer.base_layer, [[1.0], [1.0]]), (layer.lora_A["default"], [[1.0]])):
        weight.weight.data.copy_(torch.tensor(values))
    layer.lora_B["default"].weight.data.copy_(torch.tensor([[2.0**-10], [0.0]]))
    x = torch.ones(8, 1, dtype=torch.bfloat16, requires_grad=True)
    (enable_fast_lora(model)(x) @ torch.tensor([1.0, -1.0], dtype=torch.bfloat16)).sum().backward()
    assert x.grad.tolist() == [[2.0**-10]] * 8


def test_quantised(quantised_net):
    x = torch.randn(5, 64)
    model = with_lora(quantised_net, target_modules=["0", "2"])
    assert fast_coverage(model).covered == ("0", "2")
    assert_same(model, lambda model: model(x))


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_matrix_and_a_trained_base(frozen):
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    model = with_lora(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), target_modules=["0", "2"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"lora_{frozen}" not in name)  # the base trains as well
    assert_same(model, lambda model: model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(lora_minilm, review_batches, reentrant):
    lora_minilm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    lora_minilm.enable_input_require_grads()
    assert_same(lora_minilm.train(), logits(review_batches[0]))


@pytest.mark.slow
def test_autocast_and_bf16_are_as_near_to_float64_as_peft(lora_minilm, review_batches):
    """bf16 rounds by 2^-9. Each order of operations is one draw of these roundings: the tolerance is a factor 1.5."""
    run = logits(review_batches[0])
    exact = outcome(deepcopy(lora_minilm).double(), run)

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model)

    low = deepcopy(lora_minilm)
    for name, parameter in low.named_parameters():
        if "lora_" not in name:  # PEFT's default: adapters in fp32 on a bf16 base
            parameter.data = parameter.data.bfloat16()
    for model, way in ((lora_minilm, autocast), (low, run)):
        stock = distance(outcome(model, way), exact)
        fast = distance(outcome(enable_fast_lora(model), way), exact)
        assert fast < 1.5 * stock
        assert 1e-4 < stock < 0.1


def test_compiled():
    torch.manual_seed(0)
    model = with_lora(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), target_modules=["0", "2"])
    x = torch.randn(4, 8)
    stock = outcome(model, lambda model: model(x))
    enable_fast_lora(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert distance(outcome(model, lambda _: compiled(x)), stock) < 1e-5


# -- PEFT's own operations -------------------------------------------------------------------------------------------


def test_disable_merge_unmerge_switch_and_save(lora_minilm, review_batches, tmp_path):
    run, model = logits(review_batches[0]), lora_minilm
    model.add_adapter("other", LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False))

    def tour():
        with torch.no_grad():
            model.set_adapter("default")
            seen = [run(model)]
            with model.disable_adapter():
                seen.append(run(model))
            for safe in (False, True):
                model.merge_adapter(safe_merge=safe)
                seen.append(run(model))
                model.unmerge_adapter()
                seen.append(run(model))
            model.set_adapter("other")
            seen.append(run(model))
            model.base_model.set_adapter(["default", "other"])
            seen.append(run(model))
            model.set_adapter("default")
            seen.append(run(model))
        return seen

    stock = tour()
    model.save_pretrained(tmp_path / "stock")
    enable_fast_lora(model)
    for ours, theirs in zip(tour(), stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "fast")
    for file in ("adapter_model.safetensors", "other/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / folder / file) for folder in ("fast", "stock"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_mixed_batch(lora_minilm, review_batches):
    batch = {key: value for key, value in review_batches[0].items() if key != "labels"}
    names = ["default", "__base__"] * 4
    lora_minilm.eval()
    with torch.no_grad():
        stock = lora_minilm(**batch, adapter_names=names).logits
        fast = enable_fast_lora(lora_minilm)(**batch, adapter_names=names).logits
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)


def test_disabling_leaves_no_trace(lora_minilm):
    def state():
        layers = [(name, m) for name, m in lora_minilm.named_modules() if isinstance(m, LoraLayer)]
        return [(name, type(m), list(vars(m)), dict(m.lora_variant)) for name, m in layers]

    before = state()
    enable_fast_lora(lora_minilm)
    assert all(variant for *_, variant in state())
    disable_fast_lora(lora_minilm)
    assert state() == before


# -- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("omega", [0.7, 0.0])
@pytest.mark.parametrize(("tokens", "small"), [(4, False), (16, False), (4, True)])
def test_gates_go_through_the_same_path(omega, tokens, small, monkeypatch):
    if small:  # then it is PEFT's
        monkeypatch.setattr(fast_layer, "_is_small", IS_SMALL)
    torch.manual_seed(0)
    x = torch.randn(tokens, 8, requires_grad=True)
    model = with_lora(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), target_modules=["0", "2"])

    def run():
        x.grad = None
        with gated(lora_layers(model)) as gates:
            gates.write(torch.full((2,), omega))
            return *outcome(model, lambda model: model(x)), gates.gradient, x.grad.clone()

    y, gradients, at_gate, at_x = run()
    enable_fast_lora(model)
    y_, gradients_, at_gate_, at_x_ = run()
    assert distance((y_, {**gradients_, "x": at_x_}), (y, {**gradients, "x": at_x})) < 1e-5
    torch.testing.assert_close(at_gate_, at_gate, rtol=1e-5, atol=0)
    assert at_gate.abs().min() > 0


# -- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1e-7, 1e-8, 1e-9, 1e-10, 1e-12, 1e-17, 1e-40, 5e-324])
def test_a_value_is_dropped_as_seldom_as_is_asked(p):
    """100 masks of 10,000 values; Poisson's P(more than three dropped of λ = 0.1 at most) is below 10^-5."""
    torch.manual_seed(0)
    ones = torch.ones(10_000)
    dropped = 0
    for _ in range(100):
        values, mask = drop(ones, p)
        assert zeroed(ones, unpack(mask)).equal(values)
        dropped += int((values == 0).sum())
    assert dropped <= 3


def test_a_dropout_of_a_billionth_is_none():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(512, 64)
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=1e-9, init_lora_weights=False)
    model = enable_fast_lora(get_peft_model(net, config)).train()
    outputs = [model(x) for _ in range(20)]
    expected = model.eval()(x)
    assert all(torch.allclose(output, expected, rtol=1e-5, atol=1e-6) for output in outputs)


@pytest.mark.parametrize("p", [0.0001, 0.05, 0.5, 0.9])
def test_each_value_is_dropped_with_probability_p_and_independently(p):
    """n independent draws: the count is binomial, and so is that of neighbouring pairs, with p²; five deviations."""
    torch.manual_seed(0)
    n = 2_000_000
    ones = drop(torch.ones(n), p)[0] == 0
    assert abs(float(ones.sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    pairs = float((ones[::2] & ones[1::2]).sum())
    assert abs(pairs - n / 2 * p**2) < 5 * math.sqrt(n / 2 * p**2 * (1 - p**2)) + 1
    for edge in (ones[: n // 100], ones[-n // 100 :]):
        assert abs(float(edge.sum()) - n / 100 * p) < 5 * math.sqrt(n / 100 * p * (1 - p)) + 1


def test_the_first_and_the_last_value_are_dropped_as_often_as_others():
    """1,000 draws with p = 1/2: each of three counts is within five deviations of 500."""
    torch.manual_seed(0)
    counts = sum((drop(torch.ones(3), 0.5)[0] == 0).int() for _ in range(1000))
    assert ((counts - 500).abs() < 5 * math.sqrt(250)).all()


def one_layer(p, d=50, tokens=4000):
    """y = s·B·A·drop(x) alone: the base layer is zero, x is 1, A = B = the identity."""
    net = nn.Sequential(nn.Linear(d, d, bias=False))
    nn.init.zeros_(net[0].weight)
    model = get_peft_model(net, LoraConfig(r=d, lora_alpha=d, lora_dropout=p, target_modules=["0"])).train()
    (layer,) = lora_layers(model).values()
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)
    return model, torch.ones(tokens, d, requires_grad=True)


@pytest.mark.parametrize("kind", ["input", "rank"])
@pytest.mark.parametrize("p", [0.05, 0.3])
def test_dropouts_mean_variance_and_mask(kind, p):
    """With A = B = I, y is 0 or 1/(1−p) for both kinds: mean 1, variance p/(1−p); dL/dx for L = Σy is y itself."""
    torch.manual_seed(0)
    model, x = one_layer(p)
    y = enable_fast_lora(model, dropout=kind)(x)
    y.sum().backward()
    n = y.numel()
    assert set((y * (1 - p)).round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert abs(float(y.mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)
    assert torch.equal(x.grad, y.detach())  # the backward pass used the mask of the forward pass
    layer = lora_layers(model)["0"]
    a = layer.lora_A["default"].weight.grad
    kept = y.detach().T @ torch.ones_like(y)  # dL/dA = Σ over tokens: per input for "input", per rank for "rank"
    torch.testing.assert_close(a, kept.T if kind == "input" else kept)
    assert not torch.equal(enable_fast_lora(model, dropout=kind)(x), y)  # drawn anew
    assert torch.equal(model.eval()(x), torch.ones_like(x))


@pytest.mark.parametrize("kind", ["input", "rank"])
@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_dropout_spares_the_base_layer(kind, dtype, room):
    """For L = Σy, dL/dx = W0ᵀ·1 + what the adapter adds to y, which is 0 or 1/(1−p) = 1.43; A and B are in fp32."""
    torch.manual_seed(0)
    model, x = one_layer(0.3)
    base = lora_layers(model)["0"].base_layer
    nn.init.normal_(base.weight)
    base.to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    y = enable_fast_lora(model, dropout=kind)(x)
    y.sum().backward()
    added = (y - base(x)).detach().float()
    torch.testing.assert_close(x.grad.float(), base.weight.float().sum(0) + added, rtol=0, atol=room)
    assert (added > 1).any()
    assert (added < 0.5).any()


@pytest.mark.parametrize("kind", ["input", "rank"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forward_has_the_same_mask(kind, reentrant):
    model, x = one_layer(0.3)
    enable_fast_lora(model, dropout=kind)
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    torch.rand(7)  # the generator has moved on before the recomputation
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


# -- saved bytes -----------------------------------------------------------------------------------------------------


def saved_bytes(model, run):
    own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        tensor = tensor.detach()  # a kept output would keep its graph alive, and the graph the output
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


class ThreeWays(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize(("p", "kind"), [(0.0, "input"), (0.05, "input"), (0.05, "rank")])
def test_saved_bytes_are_what_the_structure_needs(p, kind):
    """x once for three projections (4·tokens·d), u for each (4·r·tokens), 2 bytes a dropped value or 1 a rank value."""
    tokens, d, r = 600, 128, 4
    model = with_lora(ThreeWays(d), target_modules=["q", "k", "v"], lora_dropout=p).train()
    x = torch.randn(tokens, d, requires_grad=True)  # so that stock saves its mask
    mask = {"input": 2 * p * tokens * d, "rank": r * tokens}[kind] if p else 0
    needed = 4 * tokens * d + 3 * (4 * r * tokens + mask)
    stock = saved_bytes(model, lambda model: model(x))
    ours = saved_bytes(enable_fast_lora(model, dropout=kind), lambda model: model(x))
    assert abs(ours - needed) < 0.02 * needed
    assert stock > 3 * needed if p else stock == needed


# -- what falls back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "p", "least"), [("input", 0.05, 2**14), ("input", 0.0, 2**16), ("rank", 0.05, 2**16)])
def test_a_small_call_is_pefts(kind, p, least, monkeypatch):
    """x has 64 numbers a token: with one token fewer than the least there is no node of ours, and PEFT's mask."""
    monkeypatch.setattr(fast_layer, "_is_small", IS_SMALL)
    model = with_lora(nn.Sequential(nn.Linear(64, 8)), target_modules=["0"], lora_dropout=p).train()
    few, enough = torch.randn(least // 64 - 1, 64), torch.randn(least // 64, 64)

    def seeded(model):
        torch.manual_seed(0)
        return model(few)

    stock = outcome(model, seeded)
    enable_fast_lora(model, kind)
    assert (distance(outcome(model, seeded), stock) < 1e-6) == (kind == "input")
    assert model(few).grad_fn.name() == "AddBackward0"
    assert model(enough).grad_fn.name() == "FusedBackward"


def test_hooks_are_called():
    torch.manual_seed(0)
    x, calls = torch.randn(4, 8), []
    model = enable_fast_lora(with_lora(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"]))
    layer = lora_layers(model)["0"]
    for module in (layer.lora_A["default"], layer.lora_B["default"], layer.base_layer):
        handle = module.register_forward_hook(lambda _module, _inputs, y: calls.append(1) or 2 * y)
        hooked = outcome(model, lambda model: model(x))
        assert calls.pop()
        disable_fast_lora(model)
        stock = outcome(model, lambda model: model(x))
        calls.clear()
        handle.remove()
        enable_fast_lora(model)
        assert distance(hooked, stock) < 1e-5


def test_what_a_hook_holds_stays_as_it_was(quantised_net):
    x, held = torch.randn(5, 64), []
    model = enable_fast_lora(with_lora(quantised_net, target_modules=["0", "2"]))
    base = lora_layers(model)["0"].base_layer
    base.register_forward_hook(lambda _module, _inputs, y: held.append(y))
    model(x)
    torch.testing.assert_close(held[0], base(x), rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["input", "output"])
def test_x_is_kept_in_its_own_type_where_a_hook_changes_the_bases(changed):
    """PEFT computes the gradient of A from the float32 x; from a bf16 one it would be off by about 2⁻¹⁰."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16 if changed == "input" else torch.float32)
    model = with_lora(net, target_modules=["0"])
    base = lora_layers(model)["0"].base_layer
    if changed == "input":
        base.register_forward_pre_hook(lambda _module, inputs: tuple(x.bfloat16() for x in inputs))
    else:
        base.register_forward_hook(lambda _module, _inputs, y: y.bfloat16())
    x, slope = torch.randn(128, 64), torch.randn(128, 64)
    gradients = []
    for enabled in (model, enable_fast_lora(deepcopy(model))):
        a = lora_layers(enabled)["0"].lora_A["default"].weight
        (enabled(x).float() * slope).sum().backward()
        gradients.append(a.grad)
    stock, fast = gradients
    assert (fast - stock).norm() < 1e-5 * stock.norm()


@pytest.mark.parametrize(
    ("net", "options", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 6)), {"use_dora": True}, "DoraLinearVariant"),
        (lambda: nn.Sequential(nn.Linear(8, 6)), {"lora_bias": True}, "lora_bias"),
        (lambda: nn.Sequential(nn.Linear(8, 6)), {"init_lora_weights": "mica"}, "MiCA"),
        (lambda: nn.Sequential(nn.Embedding(8, 6)), {}, "layer type Embedding"),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 2)), {}, "layer type Conv2d"),
    ],
)
def test_what_is_not_covered_is_named_and_left_alone(net, options, reason):
    model = with_lora(net(), target_modules=["0"], **options)
    with pytest.warns(WeightLoraWarning, match=f"does not cover 1 of 1 LoRA layers.*0: .*{reason}"):
        enable_fast_lora(model)
    assert reason in fast_coverage(model).stock["0"]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert not any(isinstance(variant, FastLora) for layer in layers for variant in layer.lora_variant.values())


def test_errors():
    with pytest.raises(SiteError, match="carries no LoRA layer"):
        enable_fast_lora(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="dropout='column'"):
        enable_fast_lora(
            inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2))), "column"
        )


def test_the_public_names():
    assert weightlora.enable_fast_lora is enable_fast_lora
    assert weightlora.disable_fast_lora is disable_fast_lora
    assert isinstance(enable_fast_lora(with_lora(nn.Sequential(nn.Linear(2, 2)), target_modules=["0"])), PeftModel)
