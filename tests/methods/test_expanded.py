"""Methods that train other numbers than A and B, and end as stock LoRA."""

import math
import warnings
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from weightlora.errors import OptionError
from weightlora.methods import entry_of, make_method
from weightlora.model.layers import adapter_layers, lora_layers
from weightlora.trainer.attach import method_for

LORA = LoraConfig(r=4, lora_alpha=6)
NAMES = ["full", "vera", "vb_lora", "tied_lora", "nora", "milora"]


def net(conv1d=False):
    torch.manual_seed(0)
    if conv1d:  # GPT-2's layer holds its weight as (in, out)
        return nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(4, 12))
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def batch(step):
    return torch.randn(9, 8, generator=torch.Generator().manual_seed(step))


def attached(name, lora=LORA, base=None, **options):
    torch.manual_seed(1)
    method = make_method(name, **options)
    return method, method.attach(net() if base is None else base, lora, [], 5)


def trained(model, steps=20):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.2, weight_decay=0.1)
    for step in range(steps):
        (model(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def added(model, name):
    """ΔW of an exported site as (out, in), from what is in its file: s·B·A."""
    layer = lora_layers(model)[name]
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


# -- vera ------------------------------------------------------------------------------------------------------------


def scaled_product(a, b, of_a, of_b):
    """diag(of_b)·B·diag(of_a)·A, one number after the other; of B and A as many rows and columns as there are."""
    update = torch.zeros(len(of_b), a.shape[1])
    for row in range(len(of_b)):
        for column in range(a.shape[1]):
            for k in range(len(of_a)):
                update[row, column] += of_b[row] * b[row, k] * of_a[k] * a[k, column]
    return update


def vera_update(layer):
    """VeRA's ΔW: a smaller site has the first rows of B and the first columns of A."""
    a, b = layer.vera_A["default"][:, : layer.in_features], layer.vera_B["default"]
    return scaled_product(a, b, layer.vera_lambda_d["default"].detach(), layer.vera_lambda_b["default"].detach())


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_vera_is_what_its_vectors_make_of_the_shared_matrices(conv1d):
    lora = LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=conv1d, target_modules=["0", "2"])
    method, model = attached("vera", lora, net(conv1d))
    before = model(batch(9))
    torch.testing.assert_close(before, net(conv1d)(batch(9)), rtol=0, atol=0)  # b = 0
    expected = {name: vera_update(layer) for name, layer in adapter_layers(trained(model)).items()}
    logits = model(batch(9))
    assert (logits - before).abs().max() > 1e-2, "it was trained"
    exported = method.export(model)
    for name, update in expected.items():
        torch.testing.assert_close(added(exported, name), update)
    torch.testing.assert_close(exported(batch(9)), logits)
    assert exported.peft_config["default"].lora_alpha == 4, "alpha/r is VeRA's strength: 1"


def test_vera_trains_two_vectors_a_site_and_shares_one_frozen_pair():
    _, model = attached("vera", projection_prng_key=3)
    assert count(model) == (12 + 4) + (4 + 4)  # b (out) and d (r) of 8→12 and 12→4
    one, two = adapter_layers(model).values()
    pair = [one.vera_A["default"], one.vera_B["default"]]
    assert [tuple(matrix.shape) for matrix in pair] == [(4, 12), (12, 4)], "the largest sizes of all sites"
    assert [m.data_ptr() for m in pair] == [two.vera_A["default"].data_ptr(), two.vera_B["default"].data_ptr()]
    start = [matrix.clone() for matrix in pair]
    trained(model)
    assert all(map(torch.equal, pair, start))
    other = next(iter(adapter_layers(attached("vera", projection_prng_key=4)[1]).values()))
    assert not torch.equal(other.vera_A["default"], start[0]), "the key decides"


# -- vb_lora ---------------------------------------------------------------------------------------------------------


def mixed(logits, bank, topk):
    """One piece: the K vectors with the largest logits, weighted by the softmax over these K."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:topk]
    weights = [math.exp(float(logits[i])) for i in order]
    return sum(weight / sum(weights) * bank[i] for weight, i in zip(weights, order, strict=True))


def vb_update(a_logits, b_logits, bank, topk):
    """ΔW = B·A of the pieces: A's logits are (r, in/b, h), B's are (out/b, r, h)."""
    r = a_logits.shape[0]
    rows = [torch.cat([mixed(piece, bank, topk) for piece in a_logits[k]]) for k in range(r)]
    columns = [torch.cat([mixed(piece[k], bank, topk) for piece in b_logits]) for k in range(r)]
    return sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_vb_lora_is_put_together_from_the_bank(conv1d):
    lora = LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=conv1d, target_modules=["0", "2"])
    method, model = attached("vb_lora", lora, net(conv1d), num_vectors=10, topk=3)
    before = model(batch(9))
    trained(model)
    expected = {
        name: vb_update(
            layer.vblora_logits_A["default"].detach(),
            layer.vblora_logits_B["default"].detach(),
            layer.vblora_vector_bank["default"].detach(),
            topk=3,
        )
        for name, layer in adapter_layers(model).items()
    }
    logits = model(batch(9))
    assert (logits - before).abs().max() > 1e-2, "it was trained"
    exported = method.export(model)
    for name, update in expected.items():
        torch.testing.assert_close(added(exported, name), update)
    torch.testing.assert_close(exported(batch(9)), logits)


def test_vb_lora_trains_the_bank_once_and_h_logits_a_piece():
    _, model = attached("vb_lora", num_vectors=10)
    b = 4  # the greatest common divisor of 8, 12 and 4
    assert count(model) == 10 * b + 4 * (8 + 12 + 12 + 4) // b * 10
    banks = [layer.vblora_vector_bank["default"] for layer in adapter_layers(model).values()]
    assert banks[0] is banks[1]


def test_the_pieces_are_as_long_as_the_sizes_allow():
    for options, length in (({}, 4), ({"vector_length": 2}, 2)):
        assert attached("vb_lora", **options)[0].plan.options["vector_length"] == length
    wide = nn.Sequential(nn.Linear(1536, 1024))  # their gcd is 512
    assert attached("vb_lora", base=wide, num_vectors=2)[0].plan.options["vector_length"] == 256
    with pytest.raises(OptionError, match=r"no vector_length above 1 divides all sizes 8, 9 of the sites"):
        attached("vb_lora", base=nn.Sequential(nn.Linear(8, 9)))
    with pytest.raises(OptionError, match=r"vector_length=3 does not divide all sizes 4, 8, 12 of the sites"):
        attached("vb_lora", vector_length=3)


# -- tied_lora -------------------------------------------------------------------------------------------------------


def twins():
    """Two sites of one shape and one of another."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def parts(layer):
    """What A and B of a layer are made of: (parametrization, what is trained) of each."""
    lists = (matrix["default"].parametrizations["weight"] for matrix in (layer.lora_A, layer.lora_B))
    return [(each[0], each.original) for each in lists]


def tied_update(layer):
    (a, v), (b, u) = ((part.matrix.detach(), scale.detach().flatten()) for part, scale in parts(layer))
    return 6 / 4 * scaled_product(a, b, v, u)


@pytest.mark.parametrize("train_shared", [True, False])
def test_tied_lora_is_what_each_site_makes_of_its_shape_s_pair(train_shared):
    method, model = attached("tied_lora", base=twins(), train_shared=train_shared)
    before = model(batch(9))
    torch.testing.assert_close(before, twins()(batch(9)), rtol=0, atol=0)  # u = 0
    start = parts(lora_layers(model)["0"])[0][0].matrix.clone()
    expected = {name: tied_update(layer) for name, layer in lora_layers(trained(model)).items()}
    assert torch.equal(parts(lora_layers(model)["0"])[0][0].matrix, start) is not train_shared
    logits = model(batch(9))
    assert (logits - before).abs().max() > 1e-2, "it was trained"
    exported = method.export(model)
    for name, update in expected.items():
        torch.testing.assert_close(added(exported, name), update)
    torch.testing.assert_close(exported(batch(9)), logits)


def test_tied_lora_trains_one_pair_a_shape_and_two_vectors_a_site():
    _, model = attached("tied_lora", base=twins())
    vectors_of_sites = 2 * (8 + 4) + (4 + 4)  # u (out) and v (r) of 8→8, twice, and 8→4
    assert count(model) == vectors_of_sites + 4 * (8 + 8) + 4 * (8 + 4)
    assert count(attached("tied_lora", base=twins(), train_shared=False)[1]) == vectors_of_sites
    first, second, other = ([part.matrix for part, _ in parts(layer)] for layer in lora_layers(model).values())
    assert all(one is two for one, two in zip(first, second, strict=True))
    assert not any(one is two for one, two in zip(first, other, strict=True))


def test_a_tied_matrix_hears_all_of_its_sites():
    _, model = attached("tied_lora", base=twins())
    untied = deepcopy(trained(model, steps=2))
    part, _ = parts(lora_layers(untied)["2"])[0]
    part.matrix = nn.Parameter(part.matrix.detach().clone())
    for each in (model, untied):
        each(batch(0)).square().sum().backward()
    gradients = [parts(lora_layers(untied)[name])[0][0].matrix.grad for name in ("0", "2")]
    heard = parts(lora_layers(model)["0"])[0][0].matrix.grad
    torch.testing.assert_close(heard, gradients[0] + gradients[1])
    assert not torch.allclose(heard, gradients[0], rtol=1e-2)


# -- nora ------------------------------------------------------------------------------------------------------------


def product(one, two):
    """A product of matrices, one number after the other."""
    result = torch.zeros(one.shape[0], two.shape[1])
    for row in range(one.shape[0]):
        for column in range(two.shape[1]):
            for k in range(one.shape[1]):
                result[row, column] += one[row, k] * two[k, column]
    return result


def onto_largest(weight, n):
    """The projection onto the n leading left singular vectors: W·Wᵀ's eigenvectors of the largest eigenvalues."""
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -n:]  # eigh's eigenvalues rise
    return vectors @ vectors.T


def base_weight(layer):
    """W0 as (out, in)."""
    weight = layer.get_base_layer().weight.detach()
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_nora_is_an_adapter_between_the_largest_singular_vectors(conv1d):
    lora = LoraConfig(r=2, lora_alpha=3, fan_in_fan_out=conv1d, target_modules=["0", "2"])
    method, model = attached("nora", lora, net(conv1d), outer_r=3)
    before = model(batch(9))
    torch.testing.assert_close(before, net(conv1d)(batch(9)), rtol=0, atol=0)  # B' = 0
    expected = {}
    for name, layer in lora_layers(trained(model)).items():
        (a, inner_a), (b, inner_b) = ((part.outer, inner.detach()) for part, inner in parts(layer))
        weight = base_weight(layer)
        torch.testing.assert_close(b @ a, onto_largest(weight, 3) @ weight)  # the best of rank 3: Eckart and Young
        torch.testing.assert_close(b.T @ b, a @ a.T)  # each has √Σ
        expected[name] = 3 / 2 * product(product(b, product(inner_b, inner_a)), a)
    logits = model(batch(9))
    assert (logits - before).abs().max() > 1e-2, "it was trained"
    exported = method.export(model)
    for name, update in expected.items():
        torch.testing.assert_close(added(exported, name), update)
    torch.testing.assert_close(exported(batch(9)), logits)


def test_nora_trains_two_small_matrices_a_site():
    for options, n in (({}, (8, 4)), ({"outer_r": 5}, (5, 4))):  # 4·2, and no more than the shapes 8→12, 12→4 allow
        method, model = attached("nora", LoraConfig(r=2), **options)
        assert count(model) == sum(2 * 2 * each for each in n)
        assert method.plan.ranks == {"0": 2, "2": 2}
    with pytest.raises(OptionError, match="outer_r=3 is not allowed: give at least the inner rank r=4"):
        attached("nora", outer_r=3)


def test_nora_starts_as_lora_on_n_inputs_would():
    _, model = attached("nora", LoraConfig(r=100), nn.Sequential(nn.Linear(200, 150)), outer_r=100)
    inner = parts(lora_layers(model)["0"])[0][1]
    assert inner.shape == (100, 100)
    assert 0.99 * 100**-0.5 < float(inner.detach().abs().max()) <= 100**-0.5  # Kaiming with a = √5 on 100 inputs


# -- milora ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_milora_trains_the_smallest_triplets_and_leaves_the_base_alone(conv1d):
    lora = LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=conv1d, target_modules=["0", "2"])
    method, model = attached("milora", lora, net(conv1d))
    before = model(batch(9))
    torch.testing.assert_close(before, net(conv1d)(batch(9)))  # B·A = B0·A0
    principal = {name: base_weight(layer) - 6 / 4 * start_of(layer) for name, layer in lora_layers(model).items()}
    expected = {}
    for name, layer in lora_layers(trained(model)).items():
        weight = base_weight(layer)
        keep = min(weight.shape) - 2  # all triplets but the two smallest
        torch.testing.assert_close(principal[name], onto_largest(weight, keep) @ weight)
        (_, a), (_, b) = parts(layer)
        expected[name] = 6 / 4 * (product(b.detach(), a.detach()) - start_of(layer))
        torch.testing.assert_close(weight + expected[name], principal[name] + 6 / 4 * (b @ a).detach())  # the paper's W
    logits = model(batch(9))
    assert (logits - before).abs().max() > 1e-2, "it was trained"
    exported = method.export(model)
    for name, update in expected.items():
        torch.testing.assert_close(added(exported, name), update)
        assert torch.linalg.matrix_rank(added(exported, name).detach()) == 4
    torch.testing.assert_close(exported(batch(9)), logits)


def start_of(layer):
    (a, _), (b, _) = parts(layer)
    return product(b.start, a.start)


@pytest.mark.parametrize(
    ("budget", "options", "trained_r"), [(4, {}, 2), (5, {}, 2), (4, {"r": 4}, 4), (1, {"r": 1}, 1)]
)
def test_milora_trains_half_of_what_it_exports(budget, options, trained_r):
    method, model = attached("milora", LoraConfig(r=budget, lora_alpha=6), **options)
    assert count(model) == trained_r * (8 + 12 + 12 + 4)
    assert method.plan.ranks == {"0": 2 * trained_r, "2": 2 * trained_r}
    assert method.most_ranks(0) == 2 * max(budget, 2 * trained_r)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {6 / budget}


def test_milora_says_where_there_is_no_room():
    with pytest.raises(OptionError, match="exports twice the rank that it trains, and r=1 cannot be halved"):
        attached("milora", LoraConfig(r=1))
    with pytest.raises(OptionError, match=r"r=5 is not allowed: 2 \(12→4\) has 4 singular triplets; lower r"):
        attached("milora", LoraConfig(r=10))


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vera", "vb_lora"])
def test_a_larger_rank_is_in_the_plan_the_budget_and_the_export(name):
    method, model = attached(name, r=6)
    assert method.plan.ranks == {"0": 6, "2": 6}
    assert method.most_ranks(0) == 12 > sum(entry.lora_r for entry in method.plan.entries)
    exported = method.export(trained(model))
    assert {layer.r["default"] for layer in lora_layers(exported).values()} == {6}


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x, labels):
        return {"loss": (self.layers(x) - labels).square().mean()}


def trainer_of(folder, dtype):
    model = get_peft_model(Loss(), LoraConfig(r=4, target_modules=["0", "2"])).to(dtype)
    rows = [{"x": batch(0)[0].to(dtype), "labels": torch.ones(4, dtype=dtype)}] * 8
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return Trainer(model, TrainingArguments(str(folder), max_steps=2, **quiet), train_dataset=rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_has_the_type_of_the_adapters_before(name, dtype, tmp_path):
    trainer = trainer_of(tmp_path, dtype)
    method = method_for(trainer, name)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {dtype}
    trainer.train()
    assert method.export(trainer.model) is trainer.model


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantised_model_is_trained_and_exported(name, quantised_net):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    method, model = attached(name, LoraConfig(r=4), quantised_net)
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:  # all that is trained but the number in the place of an identity
                parameter.sub_(0.1 * parameter.grad.sign())
    logits = model(x)
    with model.disable_adapter():
        assert (logits - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(method.export(model)(x), logits)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_one_line(name, tmp_path):
    with pytest.raises(OptionError, match=f"fast='input': {name} does not train LoRA's A and B"):
        method_for(trainer_of(tmp_path, torch.float32), name, fast="input")
    with pytest.raises(OptionError, match=f"{name} gives every site the same rank and alpha"):
        attached(name, LoraConfig(r=4, use_dora=True))
    with pytest.raises(OptionError, match="lora_bias=True is not allowed"):
        attached(name, LoraConfig(r=4, lora_bias=True))


def test_who_trains_stock_lora_is_known_before_anything_is_wrapped():
    """Several processes, FSDP and --grow_batch go by it."""
    kinds = {name: entry_of(name).trains for name in ("lora", "melora", "eva", "adalora", *NAMES)}
    stock = dict.fromkeys(("lora", "melora", "eva"), "lora")
    assert kinds == {**stock, "adalora": "ranks", **dict.fromkeys(NAMES, "other")}


@pytest.mark.parametrize("name", ["vera", "vb_lora", "milora"])
def test_no_rank_is_one_line(name):
    with pytest.raises(OptionError, match="r=0 is not allowed: give a number of at least 1"):
        attached(name, r=0)


def test_topk_out_of_range_is_one_line():
    with pytest.raises(OptionError, match="topk=11 is not allowed: give 1 to num_vectors=10"):
        make_method("vb_lora", topk=11, num_vectors=10)


# -- full ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A module with a parameter of its own and a linear layer inside, as state-space models have them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(12))
        self.inner = nn.Linear(12, 12)

    def forward(self, x):
        return self.scale * self.inner(x)


def of_all_kinds():
    """Layers with and without biases, a norm, and a linear layer that LoRA cannot carry alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.LayerNorm(12), Scaled(), nn.Linear(12, 12), nn.Linear(12, 4))


#: A base model, what LoRA is asked for, and the sites that carry ΔW; all else is trained whole.
FULL = {
    "linear": (net, {"target_modules": ["0", "2"]}, {"0": 8, "2": 4}),
    "one of two": (net, {"target_modules": ["0"]}, {"0": 8}),
    "conv1d": (lambda: net(True), {"target_modules": ["0", "2"], "fan_in_fan_out": True}, {"0": 8, "2": 4}),
    "with and without biases": (of_all_kinds, {"target_modules": ["0", "2.inner", "3"]}, {"0": 8}),
    "dropout and biases": (net, {"target_modules": ["2"], "lora_dropout": 0.5, "bias": "all"}, {"2": 4}),
}


@pytest.mark.parametrize(("make", "fields", "ranks"), FULL.values(), ids=FULL)
def test_full_is_fine_tuning_of_the_weights_themselves(make, fields, ranks):
    """Without decay: 8→12 trains ΔW·I, 12→4 trains I·ΔW, and AdamW cannot tell them from W."""
    method, model = attached("full", LoraConfig(r=4, lora_alpha=6, **fields), make())
    assert method.plan.ranks == ranks
    tuned = make()
    assert count(model) == count(tuned) + len(ranks), "a number in the place of each identity"
    for module in (model, tuned):
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
        for step in range(5):
            (module(batch(step)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (tuned(batch(9)) - make()(batch(9))).abs().max() > 1e-2, "it was trained"
    torch.testing.assert_close(model(batch(9)), tuned(batch(9)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.export(model)(batch(9)), tuned(batch(9)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(batch(9)), tuned(batch(9)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_full_trains_every_weight_of_a_language_model(tied, tmp_path):
    """Embeddings and norms too; where the output head is the embedding it stays one weight."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=tied, **sizes)
    tokens = torch.arange(16).reshape(2, 8)

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    method, model = attached("full", lora, base())
    tuned = base()
    assert count(model) == count(tuned) + 2
    for module in (model, tuned):
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
        for _ in range(5):
            module(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    logits = tuned(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-3, atol=1e-4)
    assert (logits - base()(input_ids=tokens).logits).abs().max() > 0.1, "it was trained"
    method.export(model).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        loaded = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(loaded(input_ids=tokens).logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_full_refuses_weights_that_cannot_be_trained(quantised_net):
    with pytest.raises(OptionError, match=r"full trains all weights, and 0.weight is quantised .*load_in_4bit"):
        attached("full", LoraConfig(r=4), quantised_net)


def test_full_says_where_nothing_can_carry_it():
    with pytest.raises(OptionError, match="full needs a linear layer outside of modules with parameters of their own"):
        attached("full", LoraConfig(r=4, target_modules=["inner"]), nn.Sequential(Scaled()))
    with pytest.raises(OptionError, match="full cannot train scale, which belongs to no module"):
        attached("full", LoraConfig(r=4, target_modules=["0"]), WithScale())


class WithScale(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.ones(4))
