"""What sets of sites cost: counted exactly, chosen well, told in one line when it cannot be."""

import random
import time
from copy import deepcopy
from itertools import combinations, pairwise
from math import fsum

import pytest
import torch
from fuzz import random_cost
from peft import LoraConfig, get_peft_model
from selecting import fingerprint, ruled

from weightlora import enable_fast_lora, select
from weightlora.cli import main
from weightlora.cost import step_time as timing
from weightlora.cost.knapsack import ANY, CostBudget, Item, make_cost
from weightlora.cost.saved_bytes import parameter_cost, saved_cost
from weightlora.cost.step_time import time_cost
from weightlora.errors import OptionError, SelectionError
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan, make_plan


@pytest.mark.parametrize("both", [False, True])
def test_choice_against_all_sets(both):
    draw, beaten = random.Random(0), 0
    for _ in range(100):
        n = draw.randint(1, 8)
        costs, sizes = [random_cost(draw, n) for _ in range(1 + both)], [draw.random() ** 2 for _ in range(n)]
        budget = CostBudget(tuple(costs), tuple(draw.randint(0, cost.of_all) for cost in costs))
        kept = budget.choose(sizes)
        assert not kept or budget.holds(kept)
        fitting = [s for k in range(1, n + 1) for s in combinations(range(n), k) if budget.holds(s)]
        best = max((fsum(sizes[i] for i in s) for s in fitting), default=0.0)
        assert fsum(sizes[i] for i in kept) == pytest.approx(best)
        ranked = sorted(range(n), key=lambda i: -sizes[i])
        top = [ranked[:k] for k in range(1, n + 1) if budget.holds(ranked[:k])]
        beaten += best > max((fsum(sizes[i] for i in s) for s in top), default=0.0)
    assert beaten > 5  # the control: the plain top K would not do


@pytest.mark.slow
def test_more_of_any_limit_is_no_worse_and_none_is_nothing():
    draw = random.Random(3)
    for _ in range(50):
        cost, sizes = random_cost(draw, 8), [draw.random() for _ in range(8)]
        found = [CostBudget((cost,), (part * cost.of_all // 10,)).choose(sizes) for part in range(11)]
        values = [fsum(sizes[i] for i in kept) for kept in found]
        assert all(a <= b + 1e-9 for a, b in pairwise(values))
        assert found[0] == [] or cost.of(found[0]) == 0
        assert found[-1] == [*range(8)]


def test_a_limit_below_the_frozen_model_keeps_nothing():
    cost = make_cost(2, [Item(10, ((ANY, 1 << 2),)), Item(1, ((1, 1),)), Item(1, ((2, 2),))], order=(0, 1))
    assert CostBudget((cost,), (9,)).choose([1.0, 1.0]) == []
    assert CostBudget((cost,), (11,)).choose([1.0, 2.0]) == [1]


def test_a_set_costs_no_less_than_a_part_of_it():
    draw = random.Random(1)
    for _ in range(50):
        cost = random_cost(draw, 8)
        whole = draw.sample(range(8), 6)
        assert cost.of(whole[:3]) <= cost.of(whole) <= cost.of_all


def test_worthless_sites_are_not_bought():
    cost = random_cost(random.Random(2), 4)
    assert CostBudget((cost,), (cost.of_all,)).choose([0.0, 1.0, -1.0, 2.0]) == [1, 3]


def counted(model, batch):
    """Bytes that saved_tensors_hooks see, each storage once, without the parameters: another way to the number."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        tensor = tensor.detach()  # a kept output would keep its graph alive, and the graph the output
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def planned_on_all(base, dropout, fast=None):
    lora = LoraConfig(r=8, lora_dropout=dropout, task_type="SEQ_CLS")
    sites = find_sites(base, lora).sites
    lora.target_modules = [site.name for site in sites]
    model = get_peft_model(deepcopy(base), lora).train()
    return sites, lora, model if fast is None else enable_fast_lora(model, fast)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("dropout", "fast", "dtype"),
    [
        (0.0, None, torch.float32),
        (0.05, None, torch.float32),
        (0.0, "input", torch.float32),
        (0.05, "rank", torch.float32),
        (0.0, "input", torch.bfloat16),  # under adapters that PEFT makes in float32: x is kept in the base's type
    ],
)
def test_saved_bytes_of_ten_plans_are_those_counted(minilm, review_batches, dropout, fast, dtype):
    minilm = deepcopy(minilm).to(dtype)
    sites, lora, model = planned_on_all(minilm, dropout, fast)
    batch = review_batches[0]
    real = saved_cost(model, lambda: [model(**batch).loss])

    def without_arithmetic():
        yield model(**{key: torch.zeros_like(value) for key, value in batch.items()}).loss

    assert saved_cost(model, without_arithmetic, fake=True) == real
    draw, truths = random.Random(0), []
    for _ in range(10):
        kept = draw.sample(range(36), draw.randint(1, 36))
        plan = make_plan(sites, lora, [sites[i].name for i in kept])
        planned = plan.attach(deepcopy(minilm)).train()
        truths.append(counted(planned if fast is None else enable_fast_lora(planned, fast), batch))
        assert real.of(kept) == truths[-1]
    assert max(truths) > 1.1 * min(truths)  # negative control: the plans differ


def test_of_what_the_fast_steps_dropout_keeps_the_count_is_that_of_one_draw(minilm, review_batches):
    """Two bytes for each value dropped at p: their number is binomial, and the same for no two draws."""
    batch, p = review_batches[0], 0.05
    _, _, model = planned_on_all(minilm, p, "input")
    _, _, without = planned_on_all(minilm, 0.0, "input")
    inputs = batch["input_ids"].numel() * 6 * (5 * 384 + 1536)  # values that may be dropped: the sites' x

    def cost(model, fake=False):
        def losses():
            yield model(**{key: torch.zeros_like(value) if fake else value for key, value in batch.items()}).loss

        return saved_cost(model, losses, fake=fake).of_all

    expected, bound = 2 * p * inputs, 2 * 6 * (p * (1 - p) * inputs) ** 0.5  # six standard deviations
    assert abs(cost(model) - cost(without) - expected) < bound
    assert abs(cost(model, fake=True) - cost(without) - expected) <= 36  # rounded at each site
    assert bound < 0.02 * expected


def test_the_lowest_site_decides_and_a_forced_gradient_undoes_it(minilm, review_batches):
    _, _, model = planned_on_all(minilm, 0.0)

    def cost():
        return saved_cost(model, lambda: [model(**review_batches[0]).loss])

    low, high = cost().order[0], cost().order[-1]
    assert cost().of([high]) < 0.2 * cost().of([low])
    model.enable_input_require_grads()
    assert cost().of([high]) > 0.9 * cost().of([low])


def test_parameters_are_counted_four_times_and_the_head_in_any_case(minilm):
    sites, _, model = planned_on_all(minilm, 0.0)
    head = 384 * 2 + 2
    cost = parameter_cost(model)
    assert cost.of([]) == 4 * 4 * head
    assert cost.of([3, 5]) == 4 * 4 * (head + sites[3].parameters(8) + sites[5].parameters(8))


def test_time_grows_with_the_set_and_leaves_the_weights(minilm, review_batches):
    _, _, model = planned_on_all(minilm, 0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cost = time_cost(model, lambda: [model(**review_batches[0]).loss], rounds=1)
    assert 0 < cost.of([]) <= cost.of([0]) <= cost.of([0, 1]) <= cost.of_all  # by construction
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("whole", [20, 14])
def test_the_price_is_exact_for_the_three_sets_whose_steps_are_timed(monkeypatch, whole):
    """No site 10 s, the lowest alone 14 s, and with all of them as long or longer."""
    shares = {(0b01, 0b01): 1.0, (0b10, 0b10): 2.0, (ANY, 0b01): 3.0}
    monkeypatch.setattr(timing, "_profile", lambda *_: timing._Profile(shares, order=(0, 1), whole=0.0))
    monkeypatch.setattr(timing, "_steps", lambda *_: [10, 14, whole])
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    cost = time_cost(get_peft_model(net, LoraConfig(r=1, target_modules=["0", "1"])), list, rounds=1)
    found = [cost.of(kept) / 1e9 for kept in ([], [0], [0, 1], [1])]
    assert found == pytest.approx([10, 14, whole, 10 + whole - 14])  # the second adapter is all but the first


def test_whole_steps_are_compared_round_by_round(monkeypatch):
    """Ratios 0.1, 0.3 and 0.15 to the last, whose median is 10 s: 1.5 s. The rounds' own median is 3 s."""
    monkeypatch.setattr(timing, "interleaved", lambda *_: [[1.0, 3.0, 6.0], [10.0, 10.0, 40.0]])
    assert timing._steps({}, list, None, [(), ()], 3) == pytest.approx([1.5, 10.0])


def peak_with(model, batch):
    """Bytes that autograd holds, counted, with all weights, and gradients and AdamW's two moments of the trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return counted(model, batch) + 4 * frozen + 4 * 4 * trained


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("limit", "found", "fast"),
    [
        ({"memory": "110MB"}, "peak_bytes", None),
        ({"time": 0.8}, "step_time", None),
        ({"time": 0.8}, "step_time", "input"),
    ],
)
def test_select_keeps_what_the_limit_pays_for(minilm, review_batches, limit, found, fast):
    options = {"lora": LoraConfig(r=8, task_type="SEQ_CLS"), "steps": 2, "progress": False, **ruled(head_steps=1)}
    options["fast"] = fast
    before = fingerprint(minilm)
    plan = select(minilm, review_batches, **limit, **options)
    assert fingerprint(minilm) == before
    assert 1 <= len(plan.names) < 36
    assert limit.items() <= plan.options.items()
    assert 0 < plan.options[found] <= (110e6 if found == "peak_bytes" else 0.8)
    # Measuring does not change the scores.
    assert plan.scores == select(minilm, review_batches, adapters=3, **options).scores


@pytest.mark.slow
def test_all_limits_hold_together(minilm, review_batches):
    options = {"lora": LoraConfig(r=8, task_type="SEQ_CLS"), "steps": 2, "progress": False, **ruled(head_steps=1)}
    plan = select(minilm, review_batches, adapters=9, parameters=0.1, time=0.9, memory="110MB", **options)
    assert 1 <= len(plan.names) <= 9
    assert plan.parameters <= 0.1 * plan.lora_parameters
    assert plan.options["step_time"] <= 0.9
    assert plan.options["peak_bytes"] <= 110e6


@pytest.mark.slow
def test_a_byte_budget_is_what_is_really_held(minilm, review_batches):
    options = {"lora": LoraConfig(r=8, task_type="SEQ_CLS"), "steps": 2, "progress": False, **ruled(head_steps=1)}
    plan = select(minilm, review_batches, memory="110MB", **options)
    held = peak_with(plan.attach(minilm).train(), review_batches[0])  # without what lives for a moment only
    assert 0.95 * 110e6 < held < plan.options["peak_bytes"] <= 110e6


@pytest.mark.slow
def test_the_fast_step_has_more_sites_for_the_same_bytes(minilm, review_batches):
    lora = LoraConfig(r=8, lora_dropout=0.05, task_type="SEQ_CLS")
    options = {"lora": lora, "memory": "110MB", "steps": 2, "progress": False, **ruled(head_steps=1)}
    stock, fast = (select(minilm, review_batches, fast=fast, **options) for fast in (None, "rank"))
    assert len(fast.names) > len(stock.names)
    model = enable_fast_lora(fast.attach(minilm).train(), "rank")
    assert 0.95 * 110e6 < peak_with(model, review_batches[0]) < fast.options["peak_bytes"] <= 110e6


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"time": 0.001}, r"no site fits time=0.001: the cheapest, bert\S+, takes .* of LoRA's step time; raise time"),
        ({"memory": "1kB"}, r"memory='1kB': with a single adapter, at bert\S+, a step takes .* MB; raise memory"),
    ],
)
def test_a_limit_below_the_cheapest_site(minilm, review_batches, limit, told):
    before = fingerprint(minilm)
    lora = LoraConfig(r=8, task_type="SEQ_CLS")
    with pytest.raises(OptionError, match=f"^{told}"):
        select(minilm, review_batches, lora=lora, **limit, steps=2, progress=False, **ruled(head_steps=1))
    assert fingerprint(minilm) == before


def test_checkpointing_and_a_detached_loss_are_refused(minilm, review_batches):
    _, _, model = planned_on_all(minilm, 0.0)
    with pytest.raises(SelectionError, match="nothing that is trained"):
        saved_cost(model, lambda: [model(**review_batches[0]).loss.detach()])
    model.gradient_checkpointing_enable()
    with pytest.raises(OptionError, match="gradient checkpointing"):
        saved_cost(model, lambda: [model(**review_batches[0]).loss])


@pytest.mark.slow
def test_estimate_prints_three_lines_and_three_more_for_the_fast_step(minilm, tmp_path, capsys):
    lora = LoraConfig(r=8, lora_dropout=0.05, task_type="SEQ_CLS")
    sites = find_sites(minilm, lora).sites
    kept = [site.name for site in sites[::2]]
    plan = make_plan(sites, lora, kept, base_model=minilm.config.name_or_path)
    plan.save(tmp_path / "plan.json")
    assert AdapterPlan.load(tmp_path / "plan.json") == plan
    assert main(["estimate", str(tmp_path / "plan.json"), "--batch", "2x32"]) == 0
    printed = capsys.readouterr().out
    assert f"{plan.parameters + 384 * 2 + 2:,}" in printed
    assert "1.00" in printed
    assert "fast" not in printed
    assert main(["estimate", str(tmp_path / "plan.json"), "--batch", "2x32", "--fast"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    # of a row such as "plan, fast  18  194,306  1.6  95.5  98.7  0.99  0.90–1.14"
    saved = {
        name: float(line.split()[-4])
        for name in ("plan", "plan, fast")
        for line in lines
        if f"{name}   " in line and "–" in line
    }
    model = plan.attach(minilm).train()
    ones = torch.ones((2, 32), dtype=torch.long)
    batch = {"input_ids": ones, "labels": ones[:, 0]}
    for name, step in (("plan", lambda model: model), ("plan, fast", enable_fast_lora)):
        assert saved[name] == pytest.approx(counted(step(model), batch) / 1e6, abs=0.06)
    assert saved["plan, fast"] < saved["plan"]
    assert main(["estimate", str(tmp_path / "plan.json"), "--batch", "2 of 16"]) == 2
    assert "32x512" in capsys.readouterr().err


def test_a_limit_in_bytes_does_not_count_what_dora_saves():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    batches = [{"x": torch.ones(2, 8)}] * 2

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    def kept(dora, **limit):
        lora = LoraConfig(r=2, target_modules=["0", "1"], use_dora=dora)
        return select(net, batches, lora=lora, **limit, steps=2, loss_fn=loss, progress=False).names

    with pytest.raises(OptionError, match=r"memory='1MB' is measured with plain LoRA.*leave use_dora out") as caught:
        kept(True, memory="1MB")
    assert "\n" not in str(caught.value)
    assert len(kept(False, memory="1MB")) == 2
    assert len(kept(True, adapters=1)) == 1


@pytest.mark.parametrize("profiled", [1, 3])
def test_without_rounds_the_cost_of_all_is_that_of_a_measured_step(profiled):
    """The parts of a step measured node by node add up to the step: forward pass, backward pass and AdamW."""
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "1", "2", "3"]))
    begin = time.perf_counter()
    cost = time_cost(model, lambda: [model(torch.ones(32, 64)).sum()], rounds=0, profiled=profiled)
    assert cost.of_all <= 1e9 * (time.perf_counter() - begin)
    assert all(0 < cost.of([site]) <= cost.of_all for site in range(4))
    frozen = [item for item in cost.items if all(own == ANY for own, _ in item.causes)]
    below = [{item for item in frozen if item.is_caused_by(1 << site)} for site in range(4)]
    assert below[0] > below[1] > below[2] > below[3]  # the gradient of a site passes through all layers above it
    assert cost.of([]) > 0  # the frozen model's forward pass
