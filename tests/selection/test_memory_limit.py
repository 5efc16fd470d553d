"""A limit on memory is that of the whole training step's peak: counted, kept, and told where nothing fits."""

import random
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from peft import LoraConfig
from selecting import fingerprint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightlora import enable_fast_lora, find_sites, select
from weightlora.cost.peak import Peaks
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.layers import lora_layers
from weightlora.plan.limits import Limits
from weightlora.plan.plan import make_plan
from weightlora.selection._measured import within_memory
from weightlora.selection.allocate import Costs, allocate
from weightlora.selection.batches import FirstBatch, model_loss
from weightlora.selection.stage import with_plain_lora

LORA = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
OPTIONS = {"lora": LORA, "steps": 2, "rule": "first_order", "progress": False}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
ROWS, TOKENS = 8, 24
#: Added for kernels of one thread.
SCRATCH = 2**17
LAST = "model.layers.2.mlp.down_proj"


def llama(*, checkpointing=False):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        remove_input_hooks(model)
    return model


def tokens(rows=ROWS):
    ids = torch.randint(64, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def peaks_of(model, batch, lora=LORA):
    return with_plain_lora(model, lora, find_sites(model, lora).sites, seed=0), FirstBatch(model, batch, model_loss)


class Alive(TorchDispatchMode):
    """The most bytes of tensors alive at once in a real step; after each operation it asks which storages are there."""

    def __init__(self, tensors):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata: _entry(t) for t in tensors}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor.untyped_storage()._cdata] = _entry(tensor)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def _entry(tensor):
    return StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()


def really_alive(model, batch, loss_fn=model_loss):
    """The peak of the third step of a real training, with weights, buffers and AdamW's state."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step():
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    with Alive([*model.parameters(), *model.buffers(), *state]) as counter:
        step()
    return counter.most


@pytest.mark.sampled(1)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_is_what_is_alive_in_a_real_training(checkpointing):
    """The fake step makes what the real one makes, tensor by tensor, and scratch memory is added."""
    draw, model, batch = random.Random(0), llama(checkpointing=checkpointing), tokens()
    sites = find_sites(model, LORA).sites
    context, losses = peaks_of(model, batch)
    chosen = [[len(sites) - 1], [0], [*range(len(sites))], draw.sample(range(len(sites)), 9)]
    with context as attached:
        peaks = Peaks.of_model(attached, losses)
        counts = [peaks.of(kept) for kept in chosen]
    for kept, count in zip(chosen, counts, strict=True):
        plan = make_plan(sites, LORA, [sites[i].name for i in kept])
        real = really_alive(plan.attach(deepcopy(model)).train(), batch)
        assert count - SCRATCH == pytest.approx(real, rel=0.001)
    assert max(counts) > 1.2 * min(counts)  # negative control: sets differ


def test_quantised_weights_and_their_scales_are_counted(quantised_net):
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["0", "2"])
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    net, sites = quantised_net.train(), find_sites(quantised_net, lora).sites

    def loss(model, batch):
        return model(batch["x"]).pow(2).mean()

    with with_plain_lora(net, lora, sites, seed=0) as attached:
        peaks = Peaks.of_model(attached, FirstBatch(net, {"x": x}, loss))
        one, both = peaks.of([1]), peaks.of([0, 1])
    for count, kept in ((both, sites), (one, sites[1:])):
        planned = make_plan(sites, lora, [site.name for site in kept]).attach(deepcopy(net)).train()
        assert count - SCRATCH == pytest.approx(really_alive(planned, {"x": x}, loss), rel=0.01)
    assert one - SCRATCH < 0.9 * (both - SCRATCH)


@pytest.mark.parametrize("fast", ["input", "rank"])
def test_the_fast_step_is_counted_as_it_runs(fast):
    model, batch = llama().to(torch.bfloat16), tokens()
    lora = LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM", target_modules="all-linear")
    sites = find_sites(model, lora).sites
    context, losses = peaks_of(model, batch, lora)
    with context as attached:
        enable_fast_lora(attached, fast)
        count = Peaks.of_model(attached, losses).of(range(len(sites)))
    planned = make_plan(sites, lora, [site.name for site in sites]).attach(model).train()
    assert count - SCRATCH == pytest.approx(really_alive(enable_fast_lora(planned, fast), batch), rel=0.01)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_chosen_sites_are_within_the_limit_and_the_best_single_one_is_not_wasted(checkpointing):
    """Random scores and limits between the least and the most: the count holds, and no further site would fit."""
    draw, model, batch = random.Random(1), llama(checkpointing=checkpointing), tokens()
    sites = find_sites(model, LORA).sites
    n, costs = len(sites), Costs.of(sites, LORA)
    context, losses = peaks_of(model, batch)
    with context as attached:
        peaks = Peaks.of_model(attached, losses)
        cost = peaks.cost()
        low, high = peaks.of([cost.cheapest]), peaks.of(range(n))
        assert cost.of_all >= high
        for _ in range(2):
            limit = draw.randint(low + (high - low) // 10, high)
            limits = Limits(memory=f"{limit / 1000}kB")
            scores = [draw.random() for _ in sites]
            choose = partial(allocate, sites, scores, limits=limits)
            ranks, peak = within_memory(choose, replace(costs, memory=cost), peaks)
            kept = [i for i, r in enumerate(ranks) if r]
            assert peak == peaks.of(kept) <= limits.bytes
            assert kept
            # Not far below: with the whole block below its lowest site more would not fit within 10 %.
            assert peak > 0.6 * limit


@pytest.mark.slow
def test_the_cost_under_checkpointing_is_near_the_counts_of_random_sets():
    """Three counts make the cost of 2²¹ sets; it is too low by at most the gradients of the sites that are not kept.

    They were there at the end of the step that was counted, and are subtracted though the peak may come before.
    """
    draw, model, batch = random.Random(2), llama(checkpointing=True), tokens()
    sites = find_sites(model, LORA).sites
    n = len(sites)
    context, losses = peaks_of(model, batch)
    with context as attached:
        peaks = Peaks.of_model(attached, losses)
        cost = peaks.cost()
        for _ in range(5):
            kept = draw.sample(range(n), draw.randint(1, n))
            without = sum(site.parameters(LORA.r) for i, site in enumerate(sites) if i not in kept)
            assert 0.9 * cost.of(kept) <= peaks.of(kept) <= cost.of(kept) + 4 * without


def test_measuring_leaves_the_model_as_it_was_also_after_an_error():
    model = llama()
    before, seed = fingerprint(model), torch.get_rng_state()
    context, losses = peaks_of(model, tokens())
    with context as attached:
        peaks = Peaks.of_model(attached, losses)
        inside, trained = fingerprint(attached), [p.requires_grad for p in attached.parameters()]
        state = torch.get_rng_state()
        peaks.cost()
        peaks.of([3])

        def broken():
            yield next(iter(losses()))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            replace(peaks, losses=broken).of([3])
        assert fingerprint(attached) == inside
        assert [p.requires_grad for p in attached.parameters()] == trained
        assert all(p.grad is None for p in attached.parameters())
        assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), seed)


def test_experts_whose_course_depends_on_values_are_run_for_real():
    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**sizes, head_dim=16, experts_implementation="eager")
    model, batch = transformers.Qwen3MoeForCausalLM(config).train(), tokens(2)
    n = len(find_sites(model, LORA).sites)
    context, losses = peaks_of(model, batch)
    with context as attached:
        count = Peaks.of_model(attached, losses).of(range(n))
    plan = make_plan(find_sites(model, LORA).sites, LORA, [site.name for site in find_sites(model, LORA).sites])
    assert count - SCRATCH == pytest.approx(really_alive(plan.attach(model).train(), batch), rel=0.01)


def test_select_keeps_the_peak_within_the_limit_and_says_so():
    model, batches = llama(), [tokens()] * 2
    every = select(model, batches, memory="1GB", **OPTIONS)
    assert len(every.names) == len(find_sites(model, LORA).sites)
    most = every.options["peak_bytes"]
    assert most == every.options["lora_peak_bytes"]
    before = fingerprint(model)
    plan = select(model, batches, memory=f"{0.8 * most / 1000}kB", **OPTIONS)
    assert fingerprint(model) == before
    assert really_alive(plan.attach(model).train(), batches[0]) <= 0.8 * most
    assert plan.options["peak_bytes"] <= 0.8 * most
    assert 1 <= len(plan.names) < len(every.names)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("parameters", [None, 0.5])
@pytest.mark.parametrize("rows", [4, 2])
def test_without_a_rule_all_sites_fit_with_fewer_rows_at_once(parameters, rows):
    """The count of LoRA on the smaller batch is exactly the limit, and that of the next larger part is above it."""
    model, batch = llama(), tokens()
    context, losses = peaks_of(model, batch)
    with context as attached:
        least = Peaks.of_model(attached, losses.of_rows(rows)).of(range(len(lora_layers(attached))))
    asked = {"lora": LORA, "progress": False, "parameters": parameters}
    plan = select(model, [batch], memory=f"{least / 1000}kB", **asked)
    assert (plan.rule, plan.batch_parts, {*plan.ranks.values()}) == ("uniform", 8 // rows, {2 if parameters else 4})
    assert plan.options["peak_bytes"] == plan.options["lora_rows_peak_bytes"] == least < plan.options["lora_peak_bytes"]
    parts = {name: value[:rows] for name, value in batch.items()}
    assert really_alive(plan.attach(llama()).train(), parts) <= least
    assert f"{rows} rows at once, {8 // rows} times a batch" in str(plan)
    fewer = select(model, [batch], memory=f"{(least - 1) / 1000}kB", **asked)
    assert fewer.batch_parts == 16 // rows


def test_where_a_row_does_not_fit_or_a_rule_is_named_sites_are_chosen():
    model = llama()
    context, losses = peaks_of(model, tokens(1))
    with context as attached:
        one = Peaks.of_model(attached, losses).of(range(len(lora_layers(attached))))
    asked = {"lora": LORA, "progress": False}
    with pytest.warns(WeightLoraWarning, match="they are used again"):
        plan = select(model, [tokens(1)], memory=f"{(one - 1) / 1000}kB", **asked)
    assert (plan.rule, plan.batch_parts) == ("first_order", 1)
    assert "lora_rows" not in plan.options
    context, losses = peaks_of(model, tokens())
    with context as attached:
        most = Peaks.of_model(attached, losses).of(range(len(lora_layers(attached))))
    named = select(model, [tokens()] * 2, memory=f"{0.8 * most / 1000}kB", **OPTIONS)
    assert (named.rule, named.batch_parts, named.options["lora_rows"]) == ("first_order", 1, 4)
    assert len(named.names) < len(named.entries)
    assert "LoRA, 4 rows at once" in str(named)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_no_adapter_fits_the_error_names_what_fits_with_its_numbers(checkpointing):
    """Each number is the count of a model that is really so; in 4 bit: half a byte, 4 bytes for 64, 64 for a weight."""
    model, batch = llama(checkpointing=checkpointing), tokens()
    peaks = {}
    for name, changed, rows in (("now", model, 8), ("rows", model, 4), ("checkpointed", llama(checkpointing=True), 8)):
        context, losses = peaks_of(changed, tokens(rows))
        with context as attached:
            peaks[name] = Peaks.of_model(attached, losses).of([list(lora_layers(attached)).index(LAST)])
    numbers = [site.in_features * site.out_features for site in find_sites(model, LORA).sites]
    packed = sum(n // 2 + 4 * (n // 64) + 64 for n in numbers)
    peaks["4 bit"] = peaks["now"] - 4 * sum(numbers) + packed + 4 * max(numbers)
    limit = peaks["now"] - 1000
    with pytest.raises(OptionError) as told:
        select(model, [batch] * 2, memory=f"{limit / 1000}kB", **OPTIONS)
    parts = [f"gradient checkpointing ({peaks['checkpointed'] / 1e6:.1f} MB)"] * (not checkpointing)
    parts += [f"4 rows at once instead of 8 ({peaks['rows'] / 1e6:.1f} MB)"]
    parts += [f"a base in 4 bit ({peaks['4 bit'] / 1e6:.1f} MB)"]
    step = f"with a single adapter, at {LAST}, a step takes {peaks['now'] / 1e6:.1f} MB"
    assert str(told.value) == f"memory='{limit / 1000}kB': {step}; one fits with {', or '.join(parts)}"
    with pytest.raises(OptionError, match="raise memory, or take a smaller model"):
        select(model, [batch] * 2, memory="1kB", **OPTIONS)


def test_where_lora_fits_nothing_is_scored():
    """One batch is read, which is measured; scores would decide nothing."""
    net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    read = []

    def batches():
        for _ in range(30):
            read.append(1)
            yield {"x": torch.ones(2, 8)}

    plan = select(net, batches(), lora=LoraConfig(r=4), memory="1GB", loss_fn=lambda m, b: m(b["x"]).square().mean())
    assert (plan.rule, {*plan.ranks.values()}, len(read)) == ("uniform", {4}, 1)
    assert plan.options["peak_bytes"] == plan.options["lora_peak_bytes"] < 1e9
    assert plan.spent == {"scoring_steps": 1}
    assert "nothing to select" in str(plan)


def test_ranks_above_the_users_are_counted_where_nothing_is_scored():
    """All sites fit; twice LoRA's parameters double the ranks, and with them what the adapters take, at most."""
    net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    asked = {"lora": LoraConfig(r=4), "memory": "1GB", "loss_fn": lambda m, b: m(b["x"]).square().mean()}
    plan = select(net, [{"x": torch.ones(2, 8)}], parameters=2 * 4 * 4 * 16, **asked)
    assert {*plan.ranks.values()} == {8}
    more = plan.options["peak_bytes"] - plan.options["lora_peak_bytes"]
    assert more >= 4 * 4 * 4 * 4 * 16  # four sites, four more ranks of 16 numbers, AdamW's four copies of four bytes
