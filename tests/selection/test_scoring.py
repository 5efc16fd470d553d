"""The two rules against references written from the paper's equations, on nets small enough for double precision."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from selecting import ruled
from torch import Tensor, nn

from weightlora import select
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers
from weightlora.plan.budget import Budget
from weightlora.selection.batches import cycled, model_loss, to_device
from weightlora.selection.rules.paper import hard_threshold, stoiht_step

LORA = LoraConfig(r=2, lora_alpha=6)
SCALE = 6 / 2


class Net(nn.Module):
    """Four linear layers with a tanh after each, in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)).double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def batches(count):
    torch.manual_seed(1)
    return [{"x": torch.randn(16, 6).double(), "y": torch.rand(16, 6).double()} for _ in range(count)]


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).mean()


def selected(data, **options):
    """The plan, and A as the scoring began with it."""
    started = []

    def loss(model, batch):
        if not started:
            started.extend(layer.lora_A["default"].weight.detach().clone() for layer in lora_layers(model).values())
        return squared(model, batch)

    arguments = {"lora": LORA, "adapters": 2, "steps": len(data), "loss_fn": loss, "progress": False, **options}
    return select(Net(), data, **ruled(**arguments)), started


def paper_path(a, data, *, k, order, threshold_every, learning_rate, gate_lr):
    """ω after each step of the paper's phase 1: forward with W0 + ω·s·B·A, AdamW on A and B, ω ← H_K(ω − η·∂L/∂ω)."""

    def loss(batch):
        x = batch["x"]
        for i, layer in enumerate(layers):
            weight = layer.weight.detach() + omega[i] * SCALE * b[i] @ a[i]
            x = torch.tanh(x @ weight.T + layer.bias.detach())
        return (x - batch["y"]).pow(2).mean()

    layers = Net().layers
    a = [start.clone().requires_grad_() for start in a]
    b = [torch.zeros(6, 2, dtype=torch.float64, requires_grad=True) for _ in layers]
    optimizer = torch.optim.AdamW([*a, *b], lr=learning_rate)
    omega, path = torch.ones(len(layers), dtype=torch.float64), []
    for step, batch in enumerate(data, start=1):
        omega.requires_grad_()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if order == "alternating":  # at the A and B that were just stepped
            omega.grad = None
            loss(batch).backward()
            optimizer.zero_grad()
        gradient, omega = omega.grad, omega.detach()
        if gradient.any():  # with B = 0 it is zero, and a threshold on equal gates would follow their order
            omega = omega - gate_lr * gradient
            if step % threshold_every == 0 or step == len(data):
                omega[omega.abs().argsort(descending=True)[k:]] = 0.0
        path.append(omega.tolist())
    return torch.tensor(path)


@pytest.mark.parametrize("order", ["alternating", "joint"])
@pytest.mark.parametrize("threshold_every", [1, 3, 10])
def test_stoiht_walks_the_papers_path(threshold_every, order):
    data = batches(10)
    options = {"threshold_every": threshold_every, "order": order, "learning_rate": 0.05, "gate_lr": 5.0}
    plan, a = selected(data, rule="paper", **options)
    path = paper_path(a, data, k=2, **options)
    # ω is kept in fp32: each of ten steps rounds it and its gradient by 6e-8, and these errors feed on each other.
    torch.testing.assert_close(torch.tensor(plan.history), path, rtol=1e-5, atol=1e-5)
    assert plan.names == tuple(f"layers.{i}" for i in path[-1].nonzero().flatten().tolist())
    assert list(plan.scores.values()) == list(plan.history[-1])
    others = {"threshold_every": 2, "learning_rate": 0.051, "gate_lr": 5.1}
    others["order"] = "joint" if order == "alternating" else "alternating"
    for name, other in others.items():  # negative controls
        assert not torch.allclose(path, paper_path(a, data, k=2, **{**options, name: other}), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threshold_every", [1, 2])
def test_the_first_gradient_counts_in_the_papers_order_and_is_zero_in_the_joint_one(threshold_every):
    plan, _ = selected(batches(2), rule="paper", threshold_every=threshold_every)
    assert plan.history[0].count(0.0) == (2 if threshold_every == 1 else 0)
    assert 1.0 not in plan.history[0]
    plan, _ = selected(batches(2), rule="paper", threshold_every=threshold_every, order="joint")
    assert plan.history[0] == (1.0,) * 4
    assert plan.history[1].count(0.0) == 2


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.slow
def test_papers_first_survivors_on_minilm_have_the_largest_gradients(minilm, review_batches):
    """With B = 0 and a small first AdamW step of −η·sign, the gradient of ω after it is −η·s·‖∂L/∂B‖₁."""
    batch = {key: torch.cat([batch[key] for batch in review_batches]) for key in review_batches[0]}
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")
    norms = {}

    def loss(model, batch):
        if not norms:
            matrices = {name: layer.lora_B["default"].weight for name, layer in lora_layers(model).items()}
            gradients = torch.autograd.grad(model(**batch).loss, list(matrices.values()))
            norms.update(zip(matrices, (g.abs().sum().item() for g in gradients), strict=True))
        return model(**batch).loss

    options = {"rule": "paper", "head_steps": 0, "steps": 2, "learning_rate": 1e-4, "loss_fn": loss, "progress": False}
    plan = select(without_dropout(minilm), [batch, batch], lora=lora, adapters=10, **ruled(**options))
    survivors = {entry.site.name for entry, omega in zip(plan.entries, plan.history[0], strict=True) if omega}
    assert survivors == set(sorted(norms, key=norms.get, reverse=True)[:10]) == set(plan.names)
    assert survivors != set(sorted(norms)[:10])  # negative control: equal gates would be cut by name


def test_first_order_score_is_the_gates_gain_for_a_small_first_step():
    """∂L/∂ω at B = −h·sign(mean ∂L/∂B) is −h·score + O(h²): divided by −h, Richardson leaves O(h²)."""
    data = batches(3)
    plan, a = selected(data, rule="first_order")
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=list(plan.scores)))
    layers = lora_layers(model)
    weights = [layer.lora_B["default"].weight for layer in layers.values()]
    for layer, start in zip(layers.values(), a, strict=True):
        layer.lora_A["default"].weight.data = start

    def mean_loss():
        return sum(squared(model, batch) for batch in data) / len(data)

    directions = [gradient.sign() for gradient in torch.autograd.grad(mean_loss(), weights)]

    def gain(h):
        for weight, direction in zip(weights, directions, strict=True):
            weight.data = -h * direction
            weight.grad = None
        with gated(layers) as gates:
            mean_loss().backward()
            return gates.gradient / -h

    h, scores = 1e-3, torch.tensor(list(plan.scores.values()))
    errors = [(gain(step) / scores - 1).abs().max().item() for step in (h, h / 10)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)  # linear in h, as derived
    torch.testing.assert_close(2 * gain(h / 2) - gain(h), scores, rtol=errors[0] ** 2 * 10, atol=0)
    assert errors[0] > errors[0] ** 2 * 10  # negative control: without extrapolation the room is too small


def test_first_order_history_is_the_running_mean_of_the_gradient_while_nothing_moves():
    data = batches(4)
    plan, a = selected(data, rule="first_order")
    assert plan.history[-1] == tuple(plan.scores.values())
    for steps in (2, 3):
        shorter, same_a = selected(data[:steps], rule="first_order")
        assert all(torch.equal(x, y) for x, y in zip(a, same_a, strict=True))
        assert shorter.history == plan.history[:steps]
    # A repeated batch has the same gradient each time, for nothing moves, and the mean of equals is the same.
    repeated, _ = selected([data[0]] * 4, rule="first_order")
    for row in repeated.history:
        assert row == pytest.approx(plan.history[0], rel=1e-6)
    assert plan.history[3] != pytest.approx(plan.history[0], rel=1e-2)


@pytest.mark.parametrize("rule", ["first_order", "paper"])
def test_head_is_trained_alone_before_the_sites_are_scored(rule):
    """Everything that requires a gradient is recorded at each step of the scoring, and whether the adapters run."""
    trained, idle, losses = [], [], []
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()

    def loss(model, batch):
        trained.append({n for n, p in model.named_parameters() if p.requires_grad})
        idle.append(all(layer.disable_adapters for layer in lora_layers(model).values()))
        value = squared(model, batch)
        losses.append(value.item())
        return value

    lora = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    options = {"steps": 2, "head_steps": 30, "learning_rate": 0.05, "rule": rule, "loss_fn": loss}
    select(net, batches(1) * 32, lora=lora, adapters=1, progress=False, **ruled(**options, order="joint"))
    head = {"2.modules_to_save.default.weight", "2.modules_to_save.default.bias"}
    adapter = {"0.lora_A.default.weight", "0.lora_B.default.weight"}
    assert trained[:30] == [head] * 30
    assert trained[30:] == [{"0.lora_B.default.weight"} if rule == "first_order" else adapter | head] * 2
    assert idle == [True] * 30 + [False] * 2
    assert losses[30] < losses[0] / 2


@pytest.mark.parametrize(("rule", "head_learning_rate"), [("first_order", 0.2), ("paper", 0.2), ("paper", None)])
def test_a_head_moves_at_its_own_rate(rule, head_learning_rate):
    """AdamW's first step is w ← (1 − 0.01·learning_rate)·w − η·g/(|g| + ε): η for each weight, but for the decay."""
    seen = []
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()

    def loss(model, batch):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n})
        return squared(model, batch)

    lora = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    rates = {
        "learning_rate": 0.05,
        **({} if head_learning_rate is None else {"head_learning_rate": head_learning_rate}),
    }
    options = {"steps": 2, "head_steps": 2, **rates, "rule": rule, "loss_fn": loss, "progress": False, "order": "joint"}
    plan = select(net, batches(1) * 4, lora=lora, adapters=1, **ruled(**options))
    assert {key: plan.options[key] for key in rates} == rates
    assert ("head_learning_rate" in plan.options) == (head_learning_rate is not None)

    def moved(name, learning_rate, call):
        before, after = seen[call][name], seen[call + 1][name]
        assert (after - before * (1 - 0.01 * learning_rate)).abs().flatten().tolist() == pytest.approx(
            [learning_rate] * before.numel(), rel=1e-3
        )

    head = "2.modules_to_save.default.weight"
    moved(head, 0.05 if head_learning_rate is None else 0.2, call=0)
    if rule == "paper":  # its own optimizer begins with the third batch
        moved(head, 0.05 if head_learning_rate is None else 0.2, call=2)
        moved("0.lora_B.default.weight", 0.05, call=2)


# What it takes and what it refuses


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("rule", "lora"), ("steps", 1), ("steps", 0), ("head_steps", -1), ("threshold_every", 0)),
        *(
            ("learning_rate", float("nan")),
            ("learning_rate", 0.0),
            ("learning_rate", float("inf")),
            ("head_learning_rate", 0.0),
            ("gate_lr", -1.0),
        ),
    ],
)
def test_option_out_of_its_range_is_named_with_its_value(option, value):
    with pytest.raises(OptionError) as error:
        selected(batches(2), **{"rule": "paper", option: value})
    assert f"{option}={value!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_fewer_batches_are_used_again_with_a_warning():
    with pytest.warns(WeightLoraWarning, match="3 batches for 7 scoring steps"):
        assert list(cycled(iter("abc"), 7)) == list("abcabca")


def test_no_batch_more_than_needed_is_drawn():
    source = iter(range(10))
    assert list(cycled(source, 4)) == [0, 1, 2, 3]
    assert next(source) == 4


def test_no_batch_at_all_is_an_error():
    with pytest.raises(SelectionError, match="batches is empty"):
        next(cycled([], 3))


def test_model_loss_needs_a_mapping_and_a_loss():
    with pytest.raises(SelectionError, match="a batch is a tensor of shape \\(2,\\)"):
        model_loss(nn.Identity(), torch.ones(2))
    with pytest.raises(SelectionError, match="no loss; put labels into the batches"):
        model_loss(nn.Identity(), {"input": torch.ones(2)})


def test_to_device_moves_tensors_of_a_mapping_and_leaves_the_rest():
    batch = {"x": torch.ones(2), "text": ["a"]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].device.type == "meta"
    assert moved["text"] is batch["text"]
    assert batch["x"].device.type == "cpu"
    assert to_device("anything", torch.device("meta")) == "anything"


# -- hard thresholding, against all supports -------------------------------------------------------------------------

# Whole numbers: sums of squares are exact, and ties are common.
OMEGAS = st.lists(st.integers(-4, 4), min_size=1, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float)
)


def nearest_sparse(omega: Tensor, k: int) -> Tensor:
    """Slow reference: of all supports of size K, the one that loses least; the first of equals."""
    values = omega.tolist()
    support = max(combinations(range(len(values)), k), key=lambda kept: sum(values[i] ** 2 for i in kept))
    return torch.tensor([value if i in support else 0.0 for i, value in enumerate(values)])


@given(OMEGAS, st.data())
def test_hard_threshold_is_the_nearest_k_sparse_vector(omega, data):
    k = data.draw(st.integers(1, len(omega)))
    budget = Budget.of_count(k, n=len(omega))
    assert hard_threshold(omega, budget).equal(nearest_sparse(omega, k))


@given(OMEGAS, st.data())
def test_hard_threshold_is_idempotent_and_leaves_its_input(omega, data):
    budget = Budget.of_count(data.draw(st.integers(1, len(omega))), n=len(omega))
    before = omega.clone()
    once = hard_threshold(omega, budget)
    assert hard_threshold(once, budget).equal(once)
    assert omega.equal(before)
    assert once.data_ptr() != omega.data_ptr()


def test_a_large_negative_gate_stays():
    omega, budget = torch.tensor([0.5, -2.0]), Budget.of_count(1, n=2)
    assert hard_threshold(omega, budget).tolist() == [0.0, -2.0]


def test_equal_gates_are_told_apart_by_their_place_which_is_the_order_of_names():
    assert hard_threshold(torch.ones(5), Budget.of_count(2, n=5)).tolist() == [1, 1, 0, 0, 0]
    assert hard_threshold(torch.tensor([-1.0, 1.0]), Budget.of_count(1, n=2)).tolist() == [-1, 0]


def test_a_parameter_budget_keeps_the_largest_that_it_can_pay_for():
    omega = torch.tensor([1.0, 3.0, 2.0])
    assert hard_threshold(omega, Budget(costs=(1, 4, 3), limit=4)).tolist() == [0, 3, 0]
    assert hard_threshold(omega, Budget(costs=(1, 5, 3), limit=4)).tolist() == [1, 0, 2]


@given(OMEGAS)
def test_a_zero_gradient_changes_nothing_whatever_the_budget(omega):
    budget = Budget.of_count(1, n=len(omega))
    same = stoiht_step(omega, torch.zeros_like(omega), gate_lr=5.0, budget=budget)
    assert same.equal(omega)
    assert same.data_ptr() != omega.data_ptr()


def test_one_gradient_that_is_not_zero_is_enough_to_threshold():
    step = stoiht_step(torch.ones(3), torch.tensor([0.0, 0.0, 1e-20]), gate_lr=5.0, budget=Budget.of_count(1, n=3))
    assert step.tolist() == [1, 0, 0]


@given(OMEGAS, st.data())
def test_a_step_is_the_threshold_of_the_gradient_step(omega, data):
    n = len(omega)
    gradient = torch.tensor(data.draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n).filter(any))).float()
    budget = Budget.of_count(data.draw(st.integers(1, n)), n=n)
    before, moved = (omega.clone(), gradient.clone()), omega - 0.5 * gradient  # halves are exact too
    assert stoiht_step(omega, gradient, gate_lr=0.5, budget=None).equal(moved)
    step = stoiht_step(omega, gradient, gate_lr=0.5, budget=budget)
    assert step.equal(hard_threshold(moved, budget))
    assert omega.equal(before[0])
    assert gradient.equal(before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    omega = torch.tensor([1.0, 2.0], dtype=dtype)
    assert stoiht_step(omega, omega, gate_lr=0.1, budget=Budget.of_count(1, n=2)).dtype == dtype
