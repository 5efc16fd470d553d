"""The rules that score by gradients, against references from the gradients of a plain net's own weights.

With W = W0 + s·B·A, ∂L/∂B = s·∂L/∂W·Aᵀ. So one reference, autograd on the net without adapters, serves all rules.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from selecting import BY_GRADIENT, STUDY, fingerprint
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from benchmarks.choice.rules.weight_gradients import weight_gradients
from weightlora import select
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.model.layers import lora_layers
from weightlora.selection.rules import rule_of
from weightlora.selection.rules.kappa_tune import full_weight

pytestmark = pytest.mark.slow  # rules of the study, not of the package
NAMES = [*BY_GRADIENT]
WITHOUT_A = ("relative_gradient", "aletheia", "gora")
LORA = LoraConfig(r=2, lora_alpha=6)
SCALE = 6 / 2


class Mixed(nn.Module):
    """Sequences of three tokens; a Conv1D, a layer that is called twice, and a change in place after a layer."""

    def __init__(self, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.twice = nn.Linear(6, 4), Conv1D(5, 4), nn.Linear(5, 5)
        nn.init.normal_(self.conv.weight)
        self.double()
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.first(x).tanh_()
        if self.checkpointed is None:
            return self.tail(x)
        return checkpoint(self.tail, x, use_reentrant=self.checkpointed)

    def tail(self, x):
        x = self.conv(x).tanh()
        return self.twice(self.twice(x).tanh())


def batches(count, rows=4):
    torch.manual_seed(1)
    return [{"x": torch.randn(rows, 3, 6).double(), "y": torch.rand(rows, 3, 5).double()} for _ in range(count)]


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).mean()


def selected(rule, data, net=None, loss_fn=squared, **options):
    """The plan, and A by site as the scoring began with it."""
    started = {}

    def loss(model, batch):
        if not started:
            layers = lora_layers(model).items()
            started.update((name, layer.lora_A["default"].weight.detach().clone()) for name, layer in layers)
        return loss_fn(model, batch)

    arguments = {
        "lora": LORA,
        "adapters": 1,
        "steps": len(data),
        "progress": False,
        "rule": BY_GRADIENT.get(rule, rule),
        **options,
    }
    return select(Mixed() if net is None else net, data, loss_fn=loss, **arguments), started


def linear_layers(net):
    """By site, sorted as the sites are."""
    return dict(sorted((name, m) for name, m in net.named_modules() if isinstance(m, (nn.Linear, Conv1D))))


def outward(layer, weight):
    """A weight or its gradient as (out, in)."""
    return weight.t() if isinstance(layer, Conv1D) else weight


def weights_of(net):
    return {name: outward(layer, layer.weight.detach()) for name, layer in linear_layers(net).items()}


def gradients_of(net, data):
    """∂L/∂W as (out, in) by site, for each batch: autograd on the net without adapters."""
    layers, found = linear_layers(net), []
    for batch in data:
        gradients = torch.autograd.grad(squared(net, batch), [layer.weight for layer in layers.values()])
        found.append({name: outward(layers[name], g) for name, g in zip(layers, gradients, strict=True)})
    return found


def inputs_of(net, data):
    """The tokens that reach each layer over all batches, (tokens, in), by site."""
    seen = {name: [] for name in weights_of(net)}
    for name, module in net.named_modules():
        if name in seen:
            module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
    for batch in data:
        net(batch["x"])
    return {name: torch.cat([x.flatten(0, -2) for x in parts]) for name, parts in seen.items()}


def whitening(tokens, a, damping):
    """(C + λI)^(-1/2) by eigenvalues, symmetric."""
    u = tokens @ a.t()
    c = u.t() @ u / len(u)
    values, vectors = torch.linalg.eigh(c + damping * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype))
    return vectors @ values.rsqrt().diag() @ vectors.t()


def reference(rule, a, data, chosen=None, damping=0.01):
    """The scores by the formulas, where each batch is a group of its own; ``chosen`` batches count."""
    net = Mixed()
    weights = weights_of(net)
    found = gradients_of(net, [data[i] for i in (range(len(data)) if chosen is None else chosen)])
    tokens = inputs_of(net, data)
    scores = {}
    for name, weight in weights.items():
        g = torch.stack([batch[name] for batch in found])
        if rule == "fisher":
            scores[name] = (SCALE * g @ a[name].t()).pow(2).mean(0).sum()
        elif rule == "relative_gradient":
            scores[name] = g.pow(2).sum((1, 2)).sqrt().mean() / weight.pow(2).sum().sqrt()
        elif rule == "aletheia":  # no site of this net is in a block
            scores[name] = g.pow(2).sum((1, 2)).sqrt().mean()
        elif rule == "gora":
            scores[name] = (weight * g.mean(0)).abs().mean() / sum(weight.shape) ** 0.5
        else:
            h = SCALE * g @ a[name].t() @ whitening(tokens[name], a[name], damping)
            pairs = [(i, j) for i in range(len(h)) for j in range(len(h)) if i != j]
            scores[name] = sum((h[i] / h[i].norm() * h[j]).sum() for i, j in pairs) / len(pairs)
    return torch.stack(list(scores.values())).detach()


def close(a, b, rtol=1e-6):  # the plan's numbers pass through fp32 in places
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=rtol, atol=0)


def values(plan):
    return list(plan.scores.values())


def errors(plan):
    return [entry.score_error for entry in plan.entries]


@pytest.mark.parametrize("rule", NAMES)
def test_scores_follow_the_formula(rule):
    data = batches(6)
    plan, a = selected(rule, data)
    close(values(plan), reference(rule, a, data))
    assert plan.history[-1] == tuple(plan.scores.values())
    for name, other in a.items():  # negative control: another A, another score, where the rule reads A
        changed = reference(rule, {**a, name: other.flip(1)}, data)
        assert torch.allclose(changed, reference(rule, a, data), rtol=1e-3) == (rule in WITHOUT_A)


@pytest.mark.parametrize("rule", NAMES)
def test_errors_and_history_follow_from_scores_of_fewer_batches(rule):
    data = batches(6)
    plan, a = selected(rule, data)
    without = torch.stack([reference(rule, a, data, [i for i in range(6) if i != left]) for left in range(6)])
    close(errors(plan), (without.var(0, unbiased=False) * 5).sqrt(), rtol=1e-5)
    if rule == "cross_fitted":
        assert plan.history[0] == (0.0,) * 3  # no pair of groups yet
    for steps in (2, 3, 5):
        shorter, same = selected(rule, data[:steps])
        assert all(torch.equal(x, same[name]) for name, x in a.items())
        close(shorter.history, plan.history[:steps], rtol=1e-12)


@pytest.mark.parametrize("rule", NAMES)
def test_more_steps_than_groups(rule):
    """Sixteen batches are eight groups of two; a group of one batch twice is that batch once, errors included."""
    data = batches(8)
    once, a = selected(rule, data)
    twice, _ = selected(rule, [*data, *data])
    close(values(twice), reference(rule, a, data))
    close(errors(twice), errors(once))
    assert not torch.allclose(torch.tensor(twice.history[11]), torch.tensor(twice.history[-1]), rtol=1e-3)


@pytest.mark.parametrize("rule", NAMES)
def test_micro_batches_add_up(rule):
    data = batches(4)

    def halves(model, batch):
        for part in (slice(0, 2), slice(2, 4)):
            yield squared(model, {key: value[part] for key, value in batch.items()}) / 2

    whole, _ = selected(rule, data)
    parts, _ = selected(rule, data, loss_fn=halves)
    close(values(parts), values(whole))
    alone, _ = selected(rule, data, loss_fn=lambda model, batch: next(halves(model, batch)))
    assert values(alone) != pytest.approx(values(whole), rel=1e-2)  # negative control


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(rule, reentrant):
    data = batches(4)
    plain, _ = selected(rule, data)
    checkpointed, _ = selected(rule, data, net=Mixed(reentrant))
    close(values(checkpointed), values(plain))


@pytest.mark.parametrize("rule", NAMES)
def test_a_forward_pass_without_gradients_adds_nothing(rule):
    def with_reference(model, batch):
        with torch.no_grad():
            model(batch["x"] + 1)
        return squared(model, batch)

    data = batches(4)
    close(values(selected(rule, data, loss_fn=with_reference)[0]), values(selected(rule, data)[0]), rtol=1e-12)


def operations(tensor):
    """Names of the operations in a tensor's graph."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node.name() not in ("AccumulateGrad",):
            names.add(node.name())
            waiting.extend(following for following, _ in node.next_functions)
    return names


@pytest.mark.parametrize("rule", NAMES)
def test_the_fast_step_gives_the_same_scores(rule):
    data = [{"x": torch.randn(1200, 64).double(), "y": torch.rand(1200, 64).double()} for _ in range(4)]
    seen = []

    def loss(model, batch):
        value = squared(model, batch)
        seen.append("FusedBackward" in operations(value))
        return value

    def scores(fast):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
        return values(selected(rule, data, net=net, loss_fn=loss, fast=fast)[0])

    stock, fused = scores(None), scores("input")
    assert seen == [False] * 4 + [True] * 4
    close(fused, stock)


# Each rule's own claims


def alternating(model, batch):
    return batch["sign"] * squared(model, batch)


@pytest.mark.parametrize("rule", NAMES)
def test_opposite_batches_cancel_in_two_rules_and_not_in_the_others(rule):
    """One batch four times as it is and four times with the opposite loss: the mean gradient is 1e-6/8 of its own."""
    (batch,) = batches(1)
    opposite = [{**batch, "sign": sign} for sign in (1, -1, 1, -1, 1, -1, 1, -1 + 1e-6)]
    if rule == "cross_fitted":
        with pytest.raises(SelectionError, match="none of the 1 wanted sites has a positive score"):
            selected(rule, opposite, loss_fn=alternating)
        return
    plan, _ = selected(rule, opposite, loss_fn=alternating)
    agreed, _ = selected(rule, [batch] * 8)
    close(values(plan), torch.tensor(values(agreed)) * (1e-6 / 8 if rule == "gora" else 1), rtol=1e-5)


def test_cross_fitted_score_falls_by_each_pair_that_disagrees():
    """Equal batches have the score ‖H‖. With one opposite batch of eight, 42 of 56 ordered pairs agree, and so on."""
    (batch,) = batches(1)
    for agreeing, share in {8: 1, 7: (42 - 14) / 56, 6: (32 - 24) / 56}.items():
        data = [{**batch, "sign": 1.0 if i < agreeing else -1.0} for i in range(8)]
        plan, a = selected("cross_fitted", data, loss_fn=alternating)
        close(values(plan), share * reference("cross_fitted", a, [batch, batch]))


def test_cross_fitted_score_is_the_loss_drop_along_a_step_that_changes_the_output_by_one():
    data = batches(5)
    plan, a = selected(rule_of(BY_GRADIENT["cross_fitted"], damping=1e-9), data)
    tokens, h = inputs_of(Mixed(), data), 1e-5
    for name, score in plan.scores.items():
        root = whitening(tokens[name], a[name], 1e-9)
        slopes = []
        for i, own in enumerate(data):
            direction = gradients_of(Mixed(), [own])[0][name] @ a[name].t() @ root
            b = -direction / direction.norm() @ root  # in the coordinates of B
            change = tokens[name] @ a[name].t() @ b.t()
            assert change.pow(2).sum(1).mean().item() == pytest.approx(1, rel=1e-6)
            for j, other in enumerate(data):
                if i != j:
                    losses = []
                    for sign in (1, -1):
                        net = Mixed()
                        weights_of(net)[name].data.add_(sign * h * SCALE * b @ a[name])
                        losses.append(squared(net, other).item())
                    slopes.append((losses[1] - losses[0]) / (2 * h))
        assert sum(slopes) / len(slopes) == pytest.approx(score, rel=1e-5)  # central differences: O(h²)


class Branches(nn.Module):
    """Six layers, each of which sees six features of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, 1) for _ in range(6))

    def forward(self, x):
        return sum(branch(x[:, i]) - branch(x[:, i]).detach() for i, branch in enumerate(self.branches))


def branch_scores(rule, seed, planted):
    """Scores of the branches, where the target is the sum of the features of ``planted`` plus noise."""
    torch.manual_seed(seed)

    def batch():
        x = torch.randn(64, 6, 6)
        return {"x": x, "y": x[:, planted].sum((1, 2)).unsqueeze(1) + 3 * torch.randn(64, 1)}

    plan, _ = selected(rule, [batch() for _ in range(16)], net=Branches(), seed=seed)
    return torch.tensor(values(plan))


@pytest.mark.slow
def test_cross_fitted_scores_of_noise_have_mean_zero_and_others_do_not():
    """Branch 0 can lower the loss and is always kept; the five others see noise."""
    noise = torch.cat([branch_scores("cross_fitted", seed, planted=[0])[1:] for seed in range(12)])
    error = noise.std() / len(noise) ** 0.5
    assert abs(noise.mean()) < 3 * error
    assert (noise <= 0).sum() > len(noise) / 4
    signal = torch.stack([branch_scores("cross_fitted", seed, planted=[0])[0] for seed in range(12)])
    assert signal.min() > 0
    assert signal.mean() > 10 * noise.std()
    biased = torch.cat([branch_scores("first_order", seed, planted=[0])[1:] for seed in range(12)])
    assert biased.mean() > 3 * biased.std() / len(biased) ** 0.5  # negative control


@pytest.mark.parametrize("steps", [2, 3])
def test_cross_fitted_with_few_steps_has_scores_and_no_errors(steps):
    data = batches(steps)
    plan, a = selected("cross_fitted", data)
    close(values(plan), reference("cross_fitted", a, data))
    assert "agreement" not in plan.options
    assert "agreement" in selected("cross_fitted", batches(4))[0].options


def test_gora_takes_its_error_from_a_sample_of_a_large_weight():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 5)).double()

    torch.manual_seed(1)
    data = [{"x": torch.randn(8, 300).double(), "y": torch.rand(8, 5).double()} for _ in range(4)]
    plan, _ = selected("gora", data, net=net())
    g = torch.stack([batch["0"] for batch in gradients_of(net(), data)])
    weight = net()[0].weight.detach()

    def score(chosen):
        return ((weight * g[chosen].mean(0)).abs().mean() / 600**0.5).item()

    assert plan.scores["0"] == pytest.approx(score(range(4)), rel=1e-6)  # of all 90,000 entries
    without = torch.stack([(weight * g[[i for i in range(4) if i != left]].mean(0)).abs() for left in range(4)])
    changes = (without / 600**0.5).flatten(1) - (without / 600**0.5).flatten(1).mean(0)
    exact = (changes.mean(1).square().sum() * 3 / 4).sqrt().item()
    noise = (changes.var(1).sum() / 2**16 * 3 / 4).sqrt().item()  # each mean is one of 65,536 entries
    assert errors(plan)[0] == pytest.approx(exact, abs=3 * noise)
    assert errors(plan)[0] != pytest.approx(exact, rel=1e-6)  # of a sample
    assert 3 * noise < exact / 2


def test_aletheia_keeps_whole_blocks():
    torch.manual_seed(7)
    sizes = ((6, 4, 6), (6, 4, 6), (6, 4, 5))
    net = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)) for a, b, c in sizes)).double()
    data = batches(3)
    norms = {name: 0.0 for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    for batch in data:
        net.zero_grad()
        squared(net, batch).backward()
        for name in norms:
            norms[name] += net.get_submodule(name).weight.grad.norm().item() / len(data)
    net.zero_grad()
    blocks = [norms[f"{i}.0"] + norms[f"{i}.2"] for i in range(3)]
    plan, _ = selected("aletheia", data, net=net, adapters=2)
    assert plan.scores == pytest.approx({name: blocks[int(name[0])] for name in norms}, rel=1e-6)
    best = max(range(3), key=lambda i: blocks[i])
    assert set(plan.names) == {f"{best}.0", f"{best}.2"}
    alone = sorted(norms, key=lambda name: -norms[name])[:2]
    assert set(alone) != set(plan.names)  # negative control: the sites by their own norms


def test_aletheia_names_a_site_without_a_gradient_in_a_block_that_has_one():
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))).double()
    net[0].add_module("dead", nn.Linear(5, 5).double())
    net[0].forward = lambda x: net[0][1](net[0][0](x))
    with pytest.warns(WeightLoraWarning, match=r"1 of 3 sites had no gradient in the scoring, 0\.dead among them"):
        selected("aletheia", batches(2), net=net)


def test_relative_gradient_of_a_zero_weight_is_an_error():
    net = Mixed()
    net.conv.weight.data.zero_()
    with pytest.raises(SelectionError, match="the weight of conv is zero"):
        selected("relative_gradient", batches(2), net=net)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_damping_out_of_its_range_is_named(damping):
    with pytest.raises(OptionError, match=f"damping={damping}"):
        rule_of(BY_GRADIENT["cross_fitted"], damping=damping)


# The gradients of the weights


def attached(net):
    config = LoraConfig(r=2, target_modules="first|conv|twice", fan_in_fan_out=False)
    return get_peft_model(net, config)


def test_weight_gradients_are_autograds_and_the_model_is_as_it_was():
    (batch,) = batches(1)
    layers = lora_layers(attached(net := Mixed()))
    before = fingerprint(net)
    with weight_gradients(layers) as weights:
        assert all(weight.grad is None for weight in weights)
        assert all(weight.untyped_storage().nbytes() == 8 for weight in weights)
        squared(net, batch).backward()
        found = [weight.grad.clone() for weight in weights]
        squared(net, batch).backward()
        twice = [weight.grad for weight in weights]
    for layer in layers.values():
        layer.lora_B["default"].weight.grad = layer.lora_A["default"].weight.grad = None
    assert fingerprint(net) == before
    for gradient, double, expected in zip(found, twice, gradients_of(Mixed(), [batch])[0].values(), strict=True):
        close(gradient, expected, rtol=1e-9)
        close(double, 2 * expected, rtol=1e-9)


def test_a_single_vector_is_a_token():
    net = nn.Sequential(nn.Linear(3, 2))
    layers = lora_layers(get_peft_model(net, LoraConfig(target_modules=["0"])))
    with weight_gradients(layers) as (weight,):
        net(torch.tensor([1.0, 2.0, 3.0]))[1].backward()
    assert weight.grad.tolist() == [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]


def test_a_change_of_the_input_in_place_is_an_error_and_not_a_wrong_gradient():
    layers = lora_layers(attached(net := Mixed()))
    x = torch.randn(2, 6).double()
    with weight_gradients(layers):
        y = net.first(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_full_weight_is_out_by_in():
    layers = lora_layers(attached(net := Mixed()))
    expected = weights_of(Mixed())
    assert {name: full_weight(layer).shape for name, layer in layers.items()} == {
        name: weight.shape for name, weight in expected.items()
    }
    assert torch.equal(full_weight(layers["conv"]), net.conv.base_layer.weight.t())


# Real models


@pytest.mark.parametrize("rule", NAMES)
def test_quantised_layers(quantised_net, rule):
    torch.manual_seed(1)
    data = [{"x": torch.randn(5, 64) + 1, "y": torch.full((5, 64), 2.0)} for _ in range(4)]  # batches that agree
    before = fingerprint(quantised_net)
    plan, _ = selected(rule, data, net=quantised_net)
    assert fingerprint(quantised_net) == before
    if rule in WITHOUT_A:
        plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        for i in (0, 2):
            plain[i].weight.data = dequantize_module_weight(quantised_net[i]).detach().float()
            plain[i].bias.data = quantised_net[i].bias.detach().float()
        expected, _ = selected(rule, data, net=plain)
        close(values(plan), values(expected), rtol=0.05)  # eight bits round the inputs as well
        plain[2].weight.data *= 1.1
        assert values(selected(rule, data, net=plain)[0]) != pytest.approx(values(plan), rel=0.05)  # negative control


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rule", NAMES)
def test_sites_of_minilm_are_picked(minilm, review_batches, rule):
    before = fingerprint(minilm)
    lora = LoraConfig(r=4, task_type="SEQ_CLS")
    options = {"lora": lora, "adapters": 5, "loss_fn": lambda model, batch: model(**batch).loss}
    plan, _ = selected(rule_of(BY_GRADIENT[rule], head_steps=2), review_batches, net=minilm, **options, steps=4)
    assert fingerprint(minilm) == before
    assert (plan.rule, len(plan.entries), len(plan.names)) == (BY_GRADIENT[rule], 36, 5)
    assert plan.names == tuple(sorted(sorted(plan.scores, key=plan.scores.get, reverse=True)[:5]))
    assert tuple(lora_layers(plan.attach(minilm))) == plan.names


@pytest.mark.parametrize("rule", NAMES)
def test_a_site_that_the_loss_does_not_depend_on_has_no_score(rule):
    class Idle(Mixed):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(6, 6).double()

    with pytest.warns(WeightLoraWarning, match="1 of 4 sites had no gradient in the scoring, idle among them"):
        plan, _ = selected(rule, batches(4), net=Idle())
    assert plan.scores["idle"] == 0
    assert all(score != 0 for name, score in plan.scores.items() if name != "idle")


def test_each_rule_is_found_again_by_its_own_name():
    for path in STUDY.values():
        rule = rule_of(path)
        assert rule.name == path
        assert rule_of(rule.name) == rule
