"""`select_trained`: the adapters after `attach` are those of the scoring, as references written out here train them."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from selecting import STUDY
from test_scoring import LORA, SCALE, Net, batches, squared

from weightlora import select
from weightlora.errors import OptionError, PlanMismatchError
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.selection.rules.integrated import Integrated
from weightlora.selection.rules.paper import StoIHT
from weightlora.selection.select import select_trained
from weightlora.selection.stage import adapter_weights, probed, train_adapters

STEPS, RATE = 8, 0.05


class Quick(Integrated):
    """Scores that are read from two batches."""

    probes = 2


class Quickest(Quick):
    """The same with one point of the quadrature."""

    nodes = 1


RULES = {"integrated": Quick(), "paper": StoIHT(order="joint")}


def trained_and_start(rule, **options):
    """What was trained, and A as the scoring began with it."""
    started, model = [], Net()

    def loss(model, batch):
        if not started:
            started.extend(layer.lora_A["default"].weight.detach().clone() for layer in lora_layers(model).values())
        return squared(model, batch)

    arguments = {
        "lora": LORA,
        "adapters": 2,
        "steps": STEPS,
        "learning_rate": RATE,
        "loss_fn": loss,
        "progress": False,
        **options,
    }
    return select_trained(model, batches(rule.batches((STEPS,))), rule=rule, **arguments), started, model


def slow_updates(a, *, gates, folded=True):
    """ω·s·B·A of each layer after the scoring: AdamW on A and B, with ω as in the paper where there are gates."""
    layers, data = Net().layers, batches(STEPS)
    a = [start.clone().requires_grad_() for start in a]
    b = [torch.zeros(6, 2, dtype=torch.float64, requires_grad=True) for _ in layers]
    optimizer = torch.optim.AdamW([*a, *b], lr=RATE if gates else RATE * (2 / 4) ** 0.5)  # two of four sites are kept
    omega = torch.ones(len(layers), dtype=torch.float64)
    for batch in data:
        omega.requires_grad_()
        x = batch["x"]
        for i, layer in enumerate(layers):
            weight = layer.weight.detach() + omega[i] * SCALE * b[i] @ a[i]
            x = torch.tanh(x @ weight.T + layer.bias.detach())
        (x - batch["y"]).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        gradient, omega = omega.grad, omega.detach()
        if gates and gradient.any():
            omega = omega - 5.0 * gradient
            omega[omega.abs().argsort(descending=True)[2:]] = 0.0
    with torch.no_grad():
        return [(omega[i] if folded else 1.0) * SCALE * b[i] @ a[i] for i in range(len(layers))]


def slow_loss(updates, kept, batch):
    """The loss of Net with the updates of ``kept`` alone; the others are zero."""
    net = Net()
    with torch.no_grad():
        for i, layer in enumerate(net.layers):
            if f"layers.{i}" in kept:
                layer.weight += updates[i]
        return squared(net, batch).item()


@pytest.mark.parametrize("name", RULES)
def test_the_first_loss_is_that_of_the_trained_survivors_alone(name):
    trained, a, _ = trained_and_start(RULES[name])
    held_out = batches(STEPS + 5)[-1]
    updates, kept = slow_updates(a, gates=name == "paper"), trained.plan.names
    assert len(kept) == 2
    first = squared(trained.attach(Net()), held_out).item()
    base = squared(Net(), held_out).item()
    # ω is fp32, see test_scoring; without gates everything is in double precision.
    exact = 1e-5 if name == "paper" else 1e-10
    assert first == pytest.approx(slow_loss(updates, kept, held_out), rel=exact)
    # Negative controls: the adapters that were dropped, none, and, by default, fresh ones.
    assert first != pytest.approx(slow_loss(updates, {f"layers.{i}" for i in range(4)} - set(kept), held_out), rel=1e-3)
    assert first != pytest.approx(base, rel=1e-3)
    assert squared(trained.plan.attach(Net()), held_out).item() == base


def test_the_gate_of_the_paper_is_in_b():
    trained, a, _ = trained_and_start(RULES["paper"])
    held_out = batches(STEPS + 5)[-1]
    without = slow_loss(slow_updates(a, gates=True, folded=False), trained.plan.names, held_out)
    assert squared(trained.attach(Net()), held_out).item() != pytest.approx(without, rel=1e-3)
    b = dict(trained.adapters)[trained.plan.names[0]][1]
    assert b.shape == (6, 2)


def test_the_plan_is_that_of_select_and_the_model_stays_as_it_was():
    rule = RULES["integrated"]
    trained, _, model = trained_and_start(rule)
    options = {
        "lora": LORA,
        "adapters": 2,
        "steps": STEPS,
        "learning_rate": RATE,
        "loss_fn": squared,
        "progress": False,
    }
    plan = select(Net(), batches(rule.batches((STEPS,))), rule=rule, **options)
    assert (trained.plan.history, trained.plan.ranks) == (plan.history, plan.ranks)
    assert dict(trained.plan.options) == {**plan.options, "warm_start": True}
    assert "warm_start" not in plan.options
    for (name, given), fresh in zip(model.state_dict().items(), Net().state_dict().values(), strict=True):
        assert torch.equal(given, fresh), name
    attached = trained.attach(Net())
    for layer, fresh in zip(lora_layers(attached).values(), trained.plan.names, strict=True):
        assert torch.equal(layer.base_layer.weight, Net().get_submodule(fresh).weight), "the base is untouched"


def test_what_was_trained_shares_no_memory_with_a_model():
    used = []  # kept alive, so that no other tensor gets their memory

    def loss(model, batch):
        used.extend(model.parameters())
        return squared(model, batch)

    lora = LoraConfig(r=2, target_modules=["layers.0", "layers.1", "layers.2"], modules_to_save=["layers.3"])
    trained, *_ = trained_and_start(Quick(head_steps=0), lora=lora, loss_fn=loss, adapters=1)
    attached = trained.attach(Net())
    assert len(trained.head) == 2
    tensors = [tensor for pair in trained.adapters.values() for tensor in pair] + list(trained.head.values())
    taken = {parameter.data_ptr() for parameter in (*used, *attached.parameters())}
    assert any(torch.equal(tensors[0], parameter) for parameter in used if parameter.shape == (2, 6))  # control
    for tensor in tensors:
        assert (tensor.device.type, tensor.requires_grad) == ("cpu", False)
        assert tensor.data_ptr() not in taken


def test_another_plans_adapters_are_refused():
    """With r = 1 a row would be copied into all of a larger rank."""
    trained, *_ = trained_and_start(RULES["integrated"], lora=LoraConfig(r=1))
    with pytest.raises(PlanMismatchError):
        trained.copy_into(trained.plan.expand().attach(Net()))


@pytest.mark.filterwarnings("ignore:.*batches for")
def test_minilm_goes_on_from_its_survivors_and_its_head_and_is_stock_lora(minilm, review_batches, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=["query", "value", "intermediate.dense"])
    rule, fresh = Quickest(head_steps=2), {n: p.clone() for n, p in minilm.named_parameters()}
    options = {"lora": lora, "adapters": 5, "steps": 2, "learning_rate": 2e-3, "seed": 3, "progress": False}
    trained = select_trained(minilm, review_batches, rule=rule, **options)

    sites = find_sites(minilm, lora).sites
    with probed(minilm, lora, sites, batches=review_batches, steps=6, seed=3) as stage:
        rated = type(stage)(**{**vars(stage), "learning_rate": 2e-3})
        rated.train_head(2)
        train_adapters(rated, steps=2, learning_rate=2e-3, scale=(5 / len(sites)) ** 0.5)
        with torch.no_grad():
            for name in set(stage.layers) - set(trained.plan.names):
                adapter_weights(stage, [name])[1].zero_()
            minilm.eval()
            expected = minilm(**review_batches[5]).logits.clone()

    cold = minilm(**review_batches[5]).logits
    attached = trained.attach(minilm).eval()
    first = attached(**review_batches[5]).logits
    assert torch.equal(first, expected)
    assert not torch.allclose(first, cold, atol=1e-3)  # negative control
    assert len(trained.head) == 2, "weight and bias of the classifier"
    attached.save_pretrained(str(tmp_path))
    base = attached.unload()
    for name, parameter in base.named_parameters():
        if "classifier" not in name:  # PEFT's unload leaves the trained head
            assert torch.equal(parameter, fresh[name]), name
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(fresh[name])
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(loaded(**review_batches[5]).logits, first)


@pytest.mark.parametrize("rule", ["first_order", STUDY["fisher"], STUDY["mlp"], "kappa_tune"])
def test_a_rule_that_trains_nothing_is_refused(rule):
    with pytest.raises(
        OptionError,
        match=r"warm_start=True: rule='[\w.:]+' trains no adapters.*integrated_ranks, even_ranks, paper",
    ):
        select_trained(Net(), batches(2), rule=rule, loss_fn=squared)


@pytest.mark.parametrize(
    "changed", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_adapters_that_would_compute_something_else_are_refused(changed):
    (field,) = changed
    with pytest.raises(OptionError, match=f"warm_start=True.*{field}="):
        trained_and_start(RULES["integrated"], lora=LoraConfig(r=2, **changed))


@pytest.mark.parametrize("changed", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.5}])
def test_all_other_plain_lora_is_taken(changed):
    trained, *_ = trained_and_start(RULES["integrated"], lora=LoraConfig(r=2, **changed))
    attached = trained.attach(Net())
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(attached).values())


def test_single_ranks_start_where_the_scoring_left_them():
    """The update of a kept site is the sum over its kept ranks of s·b·aᵀ, and not the whole of s·B·A."""
    left = {}

    class Watched(Quick):
        def score(self, stage, steps, budget):
            for done, found in super().score(stage, steps, budget):
                for (name, layer), own in zip(stage.layers.items(), found.ranks, strict=True):
                    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
                    left[name] = [(score, SCALE * torch.outer(b[:, k], a[k])) for k, score in enumerate(own)]
                yield done, found

    trained, *_ = trained_and_start(Watched(per="rank"), adapters=None, parameters=0.4)
    attached, x = trained.attach(Net()), torch.randn(4, 6).double()
    net = Net()
    with torch.no_grad():
        for i, layer in enumerate(net.layers):
            best = sorted(left[f"layers.{i}"], key=lambda rank: -rank[0])
            layer.weight += sum((update for _, update in best[: trained.plan.ranks[f"layers.{i}"]]), torch.zeros(6, 6))
        torch.testing.assert_close(attached(x), net(x), rtol=1e-6, atol=1e-7)  # adapters are fp32
    assert 0 < sum(trained.plan.ranks.values()) < 8
