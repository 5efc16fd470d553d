"""Rules without a backward pass against closed forms and slow references."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig
from selecting import BY_INPUTS, OF_THUMB, STUDY, fingerprint
from torch import nn

from benchmarks.choice.rules.heuristic import spread_order
from benchmarks.choice.rules.layer_inputs import ExplainedVariance, PLoP, nystrom_eigenvalues
from weightlora import select
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning

RULES = [*BY_INPUTS, *OF_THUMB]
D = 6


class Net(nn.Module):
    """Linear layers with a tanh after each, in double precision; it takes padded texts as transformers models do."""

    def __init__(self, weights, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0]) for w in weights).double()
        self.drop = nn.Dropout(dropout)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data = weight

    def forward(self, x, attention_mask=None):  # noqa: ARG002 - as in transformers
        for layer in self.layers:
            x = self.drop(layer(x).tanh())
        return x


def squared(model, batch):
    return model(**batch).square().mean()


def chosen(net, data=(), *, rule, r=2, **options):
    rule = STUDY.get(rule, rule) if isinstance(rule, str) else rule
    options = options if "parameters" in options else {"adapters": 1, **options}
    return select(net, data, lora=LoraConfig(r=r), rule=rule, loss_fn=squared, progress=False, **options)


def scores(net, data=(), **options):
    return torch.tensor([*chosen(net, data, steps=max(2, len(data)), **options).scores.values()], dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed):
    return torch.linalg.qr(drawn(D, D, seed=seed)).Q


def texts(count, tokens=5):
    return [{"x": drawn(4, tokens, D, seed=seed)} for seed in range(count)]


def inputs(net, data):
    """The tokens that enter each layer, (layers, tokens, in)."""
    x, found = torch.cat([batch["x"].flatten(0, -2) for batch in data]), []
    for layer in net.layers:
        found.append(x)
        x = layer(x).tanh()
    return torch.stack(found).detach()


# Normalised feature norm


@pytest.mark.parametrize("by", ["site", "type"])
def test_an_orthogonal_weight_has_an_nfn_of_one(by):
    """‖W·z‖ = ‖z‖ = ‖z̃‖ = ‖W·z̃‖; the bias does not count."""
    found = scores(Net([orthogonal(0), orthogonal(1)]), texts(3), rule=PLoP(by=by))
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64))
    stretched = orthogonal(1) @ torch.diag(torch.arange(1.0, 7.0).double())
    assert abs(scores(Net([orthogonal(0), stretched]), texts(3), rule=PLoP(by=by))[1] - 1) > 1e-3  # negative control


def test_nfn_of_inputs_that_a_weight_of_rank_one_reads():
    """W = a·vᵀ and z = v: NFN = 1 ÷ E|s₁| with s uniform on the unit sphere, and E|s₁| = Γ(d/2) ÷ (√π·Γ((d+1)/2))."""
    v, count = drawn(D, seed=3), 4000
    expected = math.gamma(D / 2) / (math.sqrt(math.pi) * math.gamma((D + 1) / 2))
    net, data = Net([torch.outer(drawn(D), v)]), [{"x": v.expand(count, D)}] * 8
    plan = chosen(net, data, rule=PLoP(by="site"), steps=8)
    (score,), error = plan.scores.values(), math.sqrt((1 / D - expected**2) / (8 * count))  # E s₁² = 1/d
    assert score == pytest.approx(expected, abs=4 * error)
    assert plan.entries[0].score_error == pytest.approx(error, rel=0.9)  # of 8 groups: its own standard error is 27 %
    assert len(plan.history) == 8
    assert plan.history[-1] == (score,)
    across = v.clone()
    across[:2] = torch.stack([-v[1], v[0]])
    across[2:] = 0  # negative control: vᵀz = 0, so that W·z is nearly zero and 1 ÷ NFN is huge
    assert scores(net, [{"x": (across + 0.01 * v).expand(count, D)}] * 2, rule="plop")[0] > 10 * expected


def test_history_of_nfn_holds_the_scores_of_the_batches_so_far():
    net, data = Net([drawn(D, D), drawn(D, D, seed=1)]), texts(4)
    plan = chosen(net, data, rule="plop", steps=4)
    for steps in (2, 3):
        # The same seed draws the same vectors for the first batches.
        shorter = chosen(net, data[:steps], rule="plop", steps=steps)
        torch.testing.assert_close(torch.tensor(shorter.history), torch.tensor(plan.history[:steps]))
    other = chosen(net, [*texts(5)[4:], *data[1:]], rule="plop", steps=4)
    assert other.history[-1] != pytest.approx(plan.history[-1], rel=1e-4)  # the last row is of the first batch, too


def test_projections_are_ordered_by_their_types_mean_and_then_by_their_own_nfn():
    """Sites named 0.a, 1.a and 0.b, 1.b: types a and b."""

    def net():
        torch.manual_seed(0)
        blocks = [nn.Sequential() for _ in range(3)]
        for i, block in enumerate(blocks):
            block.add_module("a", nn.Linear(D, D).double())
            block.add_module("b", nn.Linear(D, D).double())
            block.a.weight.data = drawn(D, D, seed=i) @ torch.diag(drawn(D, seed=i).exp())
            block.b.weight.data = drawn(D, D, seed=9 + i)
        return nn.Sequential(*blocks)

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    def plan(by):
        return select(
            net(), texts(4), lora=LoraConfig(r=2), rule=PLoP(by=by), adapters=2, steps=4, loss_fn=loss, progress=False
        ).scores

    own, by_type = plan("site"), plan("type")
    for kind in "ab":
        names = [name for name in own if name.endswith(kind)]
        mean = sum(1 / own[name] for name in names) / 3
        assert [by_type[name] for name in names] == pytest.approx([1 / mean] * 3, rel=1e-5)
        assert sorted(names, key=by_type.get) == sorted(names, key=own.get)
        assert len({by_type[name] for name in names}) == 3
    assert max(own.values()) / min(own.values()) > 1.01  # negative control: the order says something


# Inputs of the layers


@pytest.mark.parametrize("rule", ["plop", "explained_variance"])
def test_padding_does_not_count(rule):
    net = Net([drawn(D, D), drawn(D, D, seed=1)])
    data = texts(2)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[:, 5:] = 0
    padded = [{"x": torch.cat([batch["x"], 50 + drawn(4, 3, D, seed=7)], 1), "attention_mask": mask} for batch in data]
    torch.testing.assert_close(scores(net, padded, rule=rule), scores(net, data, rule=rule), rtol=1e-12, atol=0)
    unmasked = scores(net, [{"x": batch["x"]} for batch in padded], rule=rule)
    assert not torch.allclose(unmasked, scores(net, data, rule=rule), rtol=1e-2)  # negative control


@pytest.mark.parametrize("rule", ["plop", "explained_variance"])
def test_neither_dropout_nor_the_fast_step_changes_the_inputs(rule):
    weights, data = [drawn(D, D), drawn(D, D, seed=1)], texts(2)
    plain = scores(Net(weights), data, rule=rule)
    assert torch.equal(scores(Net(weights, dropout=0.5), data, rule=rule), plain)
    assert torch.equal(scores(Net(weights), data, rule=rule, fast="input"), plain)
    assert not torch.equal(scores(Net(weights), texts(3)[1:], rule=rule), plain)  # negative control


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(SelectionError, match="scoring step 1: the loss is nan"):
        scores(Net([drawn(D, D)]), [{"x": drawn(4, D) * float("nan")}], rule="plop")


# Explained variance


def test_inputs_of_the_adapters_rank_are_explained_wholly():
    basis = drawn(2, D)
    data = [{"x": drawn(4, 5, 2, seed=seed) @ basis} for seed in range(3)]
    net = Net([drawn(D, D)])
    for exact_up_to in (4096, 0):
        rule = ExplainedVariance(exact_up_to=exact_up_to)
        assert scores(net, data, rule=rule)[0] == pytest.approx(1, abs=1e-9)
        assert scores(net, data, rule=rule, r=1)[0] < 0.99  # negative control


def test_directions_of_equal_variance_explain_r_of_d():
    for r in (1, 2, 4):
        found = scores(Net([drawn(D, D)]), [{"x": torch.eye(D).double()}] * 2, rule="explained_variance", r=r)
        assert found[0] == pytest.approx(r / D, abs=1e-12)


@pytest.mark.parametrize("exact_up_to", [4096, 0])
def test_explained_variance_is_that_of_all_tokens_singular_values(exact_up_to):
    """With six features the sketch has as many columns as M, and is exact as well."""

    def reference(data):
        return torch.linalg.svdvals(inputs(net, data)).square()[:, :2].sum(1) / inputs(net, data).square().sum((1, 2))

    net, data = Net([drawn(D, D, seed=seed) for seed in range(3)]), texts(5)
    plan = chosen(net, data, rule=ExplainedVariance(exact_up_to=exact_up_to), steps=5)
    found = torch.tensor([*plan.scores.values()], dtype=torch.float64)
    torch.testing.assert_close(found, reference(data))
    assert not torch.allclose(found, reference(data[:4]), rtol=1e-3)  # negative control
    even, odd = reference(data[::2]), reference(data[1::2])
    errors = torch.tensor([entry.score_error for entry in plan.entries], dtype=torch.float64)
    torch.testing.assert_close(errors, (even - odd).abs() / 2)  # the jackknife of two groups
    assert len(plan.history) == 1


def test_a_sketch_finds_the_leading_eigenvalues_and_never_more():
    rows = drawn(500, 64) * torch.logspace(0, -3, 64).double()  # a spectrum that falls quickly
    moment, omega = rows.T @ rows, torch.linalg.qr(drawn(64, 24, seed=1)).Q
    found, exact = nystrom_eigenvalues(moment @ omega, omega), torch.linalg.eigvalsh(moment)
    assert (found <= exact[-24:] * (1 + 1e-9)).all()
    assert float(found[-4:].sum() / exact[-4:].sum()) == pytest.approx(1, abs=0.01)
    flat = torch.eye(64).double()  # negative control: with equal eigenvalues nothing leads, and a sketch sees 24 of 64
    assert float(nystrom_eigenvalues(flat @ omega, omega).sum()) == pytest.approx(24)


# Rules of thumb


class Decoder(nn.Module):
    """Twelve blocks with Llama's names: block 10 follows block 9, and not block 1."""

    def __init__(self, blocks=12):
        super().__init__()
        shapes = {"q": (D, D), "k": (D, 2), "v": (D, 2), "o": (D, D)}
        self.layers = nn.ModuleList()
        for _ in range(blocks):
            attention = nn.ModuleDict({f"{name}_proj": nn.Linear(*shape) for name, shape in shapes.items()})
            mlp = {"gate_proj": nn.Linear(D, 16), "up_proj": nn.Linear(D, 16), "down_proj": nn.Linear(16, D)}
            self.layers.append(nn.ModuleDict({"self_attn": attention, "mlp": nn.ModuleDict(mlp)}))


def blocks_of(names):
    return sorted({int(name.split(".")[1]) for name in names})


def endings(names):
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize(
    ("rule", "blocks"),
    [("last_layers", [9, 10, 11]), ("first_layers", [0, 1, 2]), ("strided", [0, 4, 8])],
)
def test_whole_blocks_are_kept_by_their_place(rule, blocks):
    plan = chosen(Decoder(), rule=rule, adapters=21)
    assert blocks_of(plan.names) == blocks
    assert blocks_of(chosen(Decoder(), rule=rule, adapters=21, seed=1).names) == blocks  # nothing is random
    assert blocks_of(plan.scores) == [*range(12)]


@pytest.mark.parametrize("count", [1, 2, 7, 12, 30, 64])
def test_any_first_blocks_are_spread(count):
    """The gaps between K blocks, the ends included, are at most twice as wide as an even stride, rounded up."""
    order = spread_order(count)
    assert sorted(order) == [*range(count)]
    for k in range(1, count + 1):
        taken = [*sorted(order[:k]), count]
        assert max(b - a for a, b in itertools.pairwise(taken)) <= 2 * math.ceil(count / k)
    if count > 7:  # negative control: the first half of the blocks leaves a wide gap
        assert count - (count // 2 - 1) > 2 * math.ceil(count / (count // 2))


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("v_o_down", {"v_proj", "o_proj", "down_proj"}),
    ],
)
def test_random_sites_of_a_part(rule, allowed):
    plan = chosen(Decoder(), rule=rule, parameters=0.2)
    assert endings(plan.names) == allowed
    assert endings(name for name, score in plan.scores.items() if score > 0) == allowed
    assert plan.parameters <= 0.2 * plan.lora_parameters
    other = chosen(Decoder(), rule=rule, parameters=0.2, seed=1)
    assert other.names != plan.names
    assert chosen(Decoder(), rule=rule, parameters=0.2, r=1).names == plan.names  # the draw depends on the seed alone
    with pytest.warns(WeightLoraWarning, match=f"only {12 * len(allowed)} of the 84 wanted sites"):
        assert len(chosen(Decoder(), rule=rule, adapters=84).names) == 12 * len(allowed)


def test_a_small_site_of_another_part_does_not_fill_the_budget():
    """The budget of one MLP projection and a key, which may not be kept: the projection alone is."""
    down, key = 2 * (16 + D), 2 * (D + 2)
    plan = chosen(Decoder(), rule="mlp", parameters=down + key)
    assert len(plan.names) == 1
    everything = chosen(Decoder(), rule="stratified", parameters=down + key)
    assert len(everything.names) > 1  # negative control: another rule fills it


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(SelectionError, match=r"Attention fits no site: the projections are layers.0, layers.1"):
        chosen(Net([orthogonal(0), orthogonal(1)]), rule="attention")


# All rules


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PLoP(by="layer"), "by='layer'"),
        (lambda: PLoP(head_steps=-1), "head_steps=-1"),
        (lambda: ExplainedVariance(exact_up_to=-1), "exact_up_to=-1"),
    ],
)
def test_settings_out_of_their_range_are_named(make, text):
    with pytest.raises(OptionError, match=text):
        make()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_picks_sites_of_minilm(minilm, review_batches, rule):
    """The model stays as it was; the head is not trained; rules that read no batch take none."""
    before = fingerprint(minilm)
    data = review_batches[:2] if rule in ("plop", "explained_variance") else ()
    lora = LoraConfig(r=2, task_type="SEQ_CLS")
    plan = select(minilm, data, lora=lora, adapters=5, steps=2, rule=STUDY[rule], progress=False)
    assert fingerprint(minilm) == before
    assert len(plan.names) == 5
    assert all(plan.scores[name] > 0 for name in plan.names)
    assert plan.options["head_steps"] == 0
    assert ("agreement" in plan.options) == bool(data)
    if data:
        assert all(entry.score_error is not None for entry in plan.entries)
