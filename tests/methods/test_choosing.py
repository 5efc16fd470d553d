"""The rivals that choose before training, each against a slow reference of its own."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from weightlora.errors import OptionError, SelectionError
from weightlora.methods import make_method
from weightlora.methods.flexora import alpha_gradient, unit_weights
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import find_sites
from weightlora.selection.stage import attach_plain_lora

LORA = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.3)
RATE, LOOK = 1e-2, 4


def net(sizes=(6, 8, 5)):
    torch.manual_seed(0)
    first, *rest = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(first, *(layer for linear in rest for layer in (nn.Tanh(), linear)))


def batches(count=LOOK, features=6):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(7, features, generator=generator)} for _ in range(count)]


def loss(model, batch):
    return (model(batch["x"]) - 1).square().mean()


def plan_of(name, model=None, lora=LORA, data=None, **options):
    method = make_method(name, **{"loss_fn": loss, "seed": 3, **options})
    method.attach(model or net(), lora, batches() if data is None else data, 100)
    return method.plan


def adamw(parameters):
    """AdamW as PyTorch's documents have it, one number after the other."""
    state = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in parameters]

    def step(t):
        for parameter, s in zip(parameters, state, strict=True):
            g = parameter.grad
            s["m"] = 0.9 * s["m"] + 0.1 * g
            s["v"] = 0.999 * s["v"] + 0.001 * g * g
            move = (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
            parameter.data.mul_(1 - RATE * 0.01).sub_(RATE * move)
            parameter.grad = None

    return step


def trained_adapters(model, lora, trained_names=None):
    """A, B and scale of each site after LOOK steps of plain LoRA, written out."""
    sites = find_sites(model, lora).sites
    with untouched(model, seed=3):
        attach_plain_lora(model, LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha), sites)
        layers = lora_layers(model)
        names = trained_names or list(layers)
        pairs = {n: (layers[n].lora_A["default"].weight, layers[n].lora_B["default"].weight) for n in layers}
        step = adamw([p for n in names for p in pairs[n]])
        for t, batch in enumerate(batches(), start=1):
            loss(model, batch).backward()
            step(t)
        return {n: (a.detach().clone(), b.detach().clone(), lora.lora_alpha / lora.r) for n, (a, b) in pairs.items()}


# -- dot_product -----------------------------------------------------------------------------------------------------


def slow_dot_products(alone):
    """⟨∂L/∂W, s·B·A⟩, entry by entry, from the whole gradient of the untouched model."""
    model = net()
    names = [site.name for site in find_sites(model, LORA).sites]
    for batch in batches():
        (loss(model, batch) / LOOK).backward()
    products = {}
    for name in names:
        a, b, scale = trained_adapters(net(), LORA, [name] if alone else None)[name]
        gradient = model.get_submodule(name).weight.grad
        products[name] = 0.0
        for i in range(gradient.shape[0]):
            for j in range(gradient.shape[1]):
                delta = sum(float(b[i, k] * a[k, j]) for k in range(a.shape[0]))
                products[name] += float(gradient[i, j]) * scale * delta
    return products


@pytest.mark.parametrize("alone", [False, True])
def test_dot_products_are_those_of_the_full_gradient(alone):
    slow = slow_dot_products(alone)
    plan = plan_of("dot_product", adapters=1, steps=LOOK, alone=alone, learning_rate=RATE, by="descent")
    assert plan.scores == pytest.approx({n: -p for n, p in slow.items()}, rel=1e-4)
    assert all(score > 0 for score in plan.scores.values()), "trained adapters went downhill"
    assert plan.names == (max(slow, key=lambda n: abs(slow[n])),)
    largest = plan_of("dot_product", adapters=1, steps=LOOK, alone=alone, learning_rate=RATE)
    assert largest.scores == pytest.approx({n: abs(p) for n, p in slow.items()}, rel=1e-4)


def test_training_alone_and_together_are_two_things():
    assert slow_dot_products(True) != pytest.approx(slow_dot_products(False), rel=1e-2)


# -- lora_drop -------------------------------------------------------------------------------------------------------


def slow_energies():
    """‖s·B·A·x‖² summed over rows, one number at a time; the input of each layer comes from the adapted net."""
    model = net()
    adapters = trained_adapters(model, LORA)
    sums = dict.fromkeys(adapters, 0.0)
    for batch in batches():
        for x in batch["x"]:
            for name, layer in model.named_children():
                if name not in adapters:
                    x = layer(x)
                    continue
                a, b, scale = adapters[name]
                inner = [sum(float(a[k, j] * x[j]) for j in range(len(x))) for k in range(a.shape[0])]
                added = [scale * sum(float(b[i, k]) * inner[k] for k in range(len(inner))) for i in range(b.shape[0])]
                sums[name] += sum(number**2 for number in added)
                x = layer(x) + torch.tensor(added)
    return {name: number / sum(sums.values()) for name, number in sums.items()}


NO_DROPOUT = LoraConfig(r=2, lora_alpha=6)


def test_energies_are_those_of_the_adapters_outputs():
    plan = plan_of("lora_drop", lora=NO_DROPOUT, adapters=1, steps=LOOK, learning_rate=RATE)
    assert plan.scores == pytest.approx(slow_energies(), rel=1e-4)
    assert plan.names == (max(plan.scores, key=plan.scores.get),)


@pytest.mark.parametrize("energy", [0.1, 0.6, 0.9, 1.0])
def test_the_fewest_sites_reach_the_energy(energy):
    plan = plan_of("lora_drop", net((6, 8, 8, 8, 5)), energy=energy, steps=LOOK, learning_rate=RATE)
    shares = sorted((plan.scores[name] for name in plan.names), reverse=True)
    assert sum(shares) >= energy - 1e-9
    assert sum(shares[:-1]) < energy


def test_padding_has_no_energy():
    """A row with padding has the energy of its tokens alone; without a mask it has more."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, attention_mask=None):
            mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
            return ((self.second(self.first(x).tanh()) - 1) * mask[..., None]).square().sum()

    def scores(**batch):
        torch.manual_seed(0)
        run = lambda model, given: model(**given)  # noqa: E731
        look = {"data": [batch] * 2, "loss_fn": run, "steps": 2, "learning_rate": RATE}
        return plan_of("lora_drop", Reader(), lora=NO_DROPOUT, adapters=1, **look).scores

    tokens = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([tokens, 9 * torch.ones(3, 5, 6)], dim=1)
    mask = torch.cat([torch.ones(3, 4), torch.zeros(3, 5)], dim=1)
    assert scores(x=padded, attention_mask=mask) == pytest.approx(scores(x=tokens, attention_mask=mask[:, :4]))
    assert scores(x=padded) != pytest.approx(scores(x=tokens), rel=1e-2)


def test_those_that_share_have_one_tensor_and_a_stock_checkpoint_of_copies(tmp_path):
    model = net((6, 8, 8, 8, 8))
    method = make_method("lora_drop", adapters=1, share=True, steps=LOOK, learning_rate=RATE, loss_fn=loss, seed=3)
    attached = method.attach(model, NO_DROPOUT, batches(), 100)
    layers = lora_layers(attached)
    kept = max(method.plan.scores, key=method.plan.scores.get)
    shared = [name for name in layers if name != kept and layers[name].in_features == 8]
    assert len(shared) >= 2
    assert len({layers[name].lora_A["default"].weight.data_ptr() for name in shared}) == 1
    assert layers[kept].lora_A["default"].weight.data_ptr() != layers[shared[0]].lora_A["default"].weight.data_ptr()

    optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad], lr=RATE)
    for batch in batches():
        loss(attached, batch).backward()
        optimizer.step()
    exported = method.export(attached)
    exported.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(net((6, 8, 8, 8, 8)), str(tmp_path))
    x = batches()[0]["x"]
    assert torch.equal(loaded(x), exported(x))
    separate = {layer.lora_B["default"].weight.data_ptr() for layer in lora_layers(loaded).values()}
    assert len(separate) == len(layers)


# -- eva -------------------------------------------------------------------------------------------------------------


def slow_eva(model, x, r, rho):
    """Ranks and directions from one full SVD of each layer's inputs: the pooled top n·r shares of variance."""
    shares, vectors = [], {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            _, s, v = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
            vectors[name] = v
            shares += [(float(s[k] ** 2 / (s**2).sum()), name) for k in range(round(r * rho))]
        x = layer(x)
    kept = sorted(shares, reverse=True)[: r * len(vectors)]
    return {name: sum(n == name for _, n in kept) for name in vectors}, vectors


def stretched(count, features, seed=4):
    """Rows whose directions have well separated variances."""
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.7**k for k in range(features)])


def narrow_net():
    """The second layer is given little but one direction, so that ranks have a reason to move."""
    model = net((6, 8, 7, 5))
    with torch.no_grad():
        model[0].weight[1:] *= 0.2
    return model


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_has_the_ranks_and_directions_of_a_full_svd(rho):
    model, x = narrow_net(), stretched(64, 6)
    with torch.no_grad():
        ranks, vectors = slow_eva(model, x, 2, rho)
    method = make_method("eva", rho=rho, loss_fn=loss)
    before = model(x)
    attached = method.attach(model, NO_DROPOUT, [{"x": x}], 100)
    assert method.plan.ranks == ranks
    assert sum(ranks.values()) == 3 * 2
    assert (len(set(ranks.values())) > 1) == (rho > 1), "ranks move where they may"
    assert torch.equal(attached(x), before), "B is zero"
    for name, layer in lora_layers(attached).items():
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
        assert (a @ vectors[name][: len(a)].T).diagonal().abs().min() > 0.99
        assert layer.scaling["default"] == 3.0, "alpha goes with the rank"


def test_directions_of_a_plane_are_found():
    plane = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(5))).Q.T
    inside = {"x": torch.randn(64, 2, generator=torch.Generator().manual_seed(6)) @ plane}
    attached = make_method("eva", rho=1.0, loss_fn=loss).attach(net(), NO_DROPOUT, [inside], 100)
    a = lora_layers(attached)["0"].lora_A["default"].weight
    assert (plane - plane @ a.T @ a).norm() < 1e-3
    other = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(7))).Q.T
    assert (other - other @ a.T @ a).norm() > 0.1


def test_eva_leaves_alpha_where_it_is_told_to():
    data = [{"x": stretched(64, 6)}]
    plan = plan_of("eva", narrow_net(), NO_DROPOUT, data, adjust_alpha=False)
    assert {entry.alpha for entry in plan.entries} == {6}
    assert len(set(plan.ranks.values())) > 1


def deberta():
    """DeBERTa calls its query and key projections a second time, on positions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    positions = {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}
    return DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=32, **sizes, **positions, position_buckets=4))


@pytest.mark.parametrize(("name", "options"), [("eva", {"steps": 2}), ("lora_drop", {"steps": 2, "adapters": 2})])
def test_a_classifier_whose_projections_are_called_on_positions_is_no_obstacle(name, options):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 32, (8, 6), generator=generator) for _ in range(2)]
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[:4, 4:] = 0
    data = [{"input_ids": t, "attention_mask": mask, "labels": t[:, 0] % 2} for t in tokens]
    lora = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query_proj", "key_proj", "value_proj"])
    method = make_method(name, **options)
    model = method.attach(deberta(), lora, data, 100)
    assert sum(method.plan.ranks.values()) == (6 if name == "eva" else 4)
    assert model(**data[0]).loss.isfinite()


def test_eva_says_when_the_directions_do_not_converge():
    with pytest.raises(SelectionError, match="not converged after 3 batches"):
        plan_of("eva", data=batches(2), steps=2, most=3, tau=1.0)


# -- flexora ---------------------------------------------------------------------------------------------------------


def slow_alpha(power, held_out=2, alpha_rate=0.05):
    """α of each layer after the look, with autograd through softmax and Adam written out."""
    model, data = net((6, 8, 8, 5)), batches()
    names = [site.name for site in find_sites(model, NO_DROPOUT).sites]
    with untouched(model, seed=3):
        attach_plain_lora(model, NO_DROPOUT, find_sites(model, NO_DROPOUT).sites)
        pairs = {
            n: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            for n, layer in lora_layers(model).items()
        }
        pairs = {n: tuple(p.detach().clone().requires_grad_() for p in pair) for n, pair in pairs.items()}
    alpha = torch.zeros(len(names), requires_grad=True)
    m, v, step = torch.zeros(len(names)), torch.zeros(len(names)), adamw([p for pair in pairs.values() for p in pair])

    def slow_loss(batch):
        scales, x = (len(names) * alpha.exp() / alpha.exp().sum()) ** power, batch["x"]
        for name, layer in model.named_children():
            x = (
                layer(x) + scales[names.index(name)] * 3 * x @ pairs[name][0].T @ pairs[name][1].T
                if name in names
                else layer(x)
            )
        return (x - 1).square().mean()

    for t, batch in enumerate(data[held_out:], start=1):
        slow_loss(batch).backward()
        step(t)
        alpha.grad = None
        (sum(slow_loss(b) for b in data[:held_out]) / held_out).backward()
        m, v = 0.9 * m + 0.1 * alpha.grad, 0.999 * v + 0.001 * alpha.grad**2
        alpha.data -= alpha_rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        for parameter in (alpha, *(p for pair in pairs.values() for p in pair)):
            parameter.grad = None
    return dict(zip(names, alpha.tolist(), strict=True))


FLEXORA = {"steps": 2, "validation": 2, "alpha_lr": 0.05, "learning_rate": RATE}


@pytest.mark.parametrize("power", [1, 3])
def test_alpha_is_that_of_autograd(power):
    slow = slow_alpha(power)
    plan = plan_of("flexora", net((6, 8, 8, 5)), NO_DROPOUT, adapters=1, power=power, **FLEXORA)
    assert plan.scores == pytest.approx(slow, abs=1e-5)
    assert plan.names == (max(slow, key=slow.get),)
    assert len(plan.history) == 2
    positive = plan_of("flexora", net((6, 8, 8, 5)), NO_DROPOUT, adapters=None, power=power, **FLEXORA)
    assert set(positive.names) == {name for name, number in slow.items() if number > 0}


def test_the_weights_add_up_to_the_number_of_blocks_and_their_gradient_is_autograds():
    alpha = torch.tensor([0.3, -1.0, 2.0, 0.0], requires_grad=True)
    assert float(unit_weights(alpha.detach()).sum()) == pytest.approx(4)
    by_scale = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for power in (1, 3):
        (expected,) = torch.autograd.grad((unit_weights(alpha) ** power * by_scale).sum(), alpha)
        torch.testing.assert_close(alpha_gradient(unit_weights(alpha.detach()), by_scale, power), expected)


def test_alpha_stays_where_the_held_out_rows_say_nothing():
    silent = [{"x": torch.zeros(7, 6), "weight": 0.0}] * 2 + [{**batch, "weight": 1.0} for batch in batches(2)]
    weighted = lambda model, batch: batch["weight"] * loss(model, batch)  # noqa: E731
    with pytest.raises(SelectionError, match="no block has an alpha above 0; raise steps"):
        plan_of("flexora", data=silent, loss_fn=weighted, adapters=None, **FLEXORA)


def test_whole_blocks_are_kept_within_the_budget():
    """Three blocks of two sites: a budget of five sites pays for two of them."""

    def chosen(**options):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)))
        return plan_of("flexora", model, **options, **FLEXORA).names

    assert len(chosen(adapters=5)) == 4
    assert len({name.split(".")[0] for name in chosen(adapters=5)}) == 2
    assert len(chosen(adapters=5, unit="site")) == 5
    with pytest.raises(SelectionError, match="no whole block fits adapters=1; raise it, or take unit='site'"):
        chosen(adapters=1)


def test_rows_that_are_held_out_are_not_trained_on():
    with pytest.raises(SelectionError, match="4 batches, of which 4 are held out for alpha, leave none"):
        plan_of("flexora", **{**FLEXORA, "validation": 4})


@pytest.mark.parametrize("name", ["dot_product", "lora_drop", "flexora"])
@pytest.mark.parametrize("head_learning_rate", [None, 0.2])
def test_a_new_head_moves_at_its_own_rate(name, head_learning_rate):
    """AdamW's first step is w ← (1 − 0.01·learning_rate)·w − η·g/(|g| + ε): η for each weight, but for the decay."""
    seen = []

    def watched(model, batch):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n})
        return loss(model, batch)

    lora = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    options = {
        "learning_rate": 0.05,
        "head_learning_rate": head_learning_rate,
        **({"validation": 1} if name == "flexora" else {}),
    }
    plan = plan_of(name, net().double(), lora, doubled(batches()), steps=2, adapters=1, loss_fn=watched, **options)
    assert plan.options["head_learning_rate"] == head_learning_rate
    before, after = seen[:2]
    for weight, rate in (
        ("2.modules_to_save.default.weight", head_learning_rate or 0.05),
        ("0.lora_B.default.weight", 0.05),
    ):
        step = (after[weight] - before[weight] * (1 - 0.01 * rate)).abs()
        assert step.flatten().tolist() == pytest.approx([rate] * step.numel(), rel=1e-3)


def doubled(data):
    return [{name: value.double() for name, value in batch.items()} for batch in data]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("dot_product", {"steps": 0}, "steps=0 is not allowed: give a number of at least 1"),
        ("dot_product", {"by": "sign"}, "by='sign' is not allowed: give 'magnitude' or 'descent'"),
        ("dot_product", {"adapters": 0}, "adapters=0 is not allowed"),
        ("lora_drop", {"energy": 1.1}, "energy=1.1 is not allowed: give a number of more than 0 and at most 1"),
        ("eva", {"rho": 0.5}, "rho=0.5 is not allowed: give a number of at least 1"),
        ("eva", {"most": 5}, "most=5 is not allowed: give more than steps=20"),
        ("eva", {"rho": 9}, "rho=9 asks for 18 directions at 0, whose inputs have 6; lower rho or r"),
        ("flexora", {"validation": 0}, "validation=0 is not allowed: give a number of at least 1"),
        ("flexora", {"unit": "layer"}, "unit='layer' is not allowed: give 'block' or 'site'"),
        ("lora_drop", {"steps": 0}, "steps=0 is not allowed"),
    ],
)
def test_a_value_out_of_range_is_one_line(name, options, text):
    with pytest.raises(OptionError, match=text):
        plan_of(name, **options)
