"""The parameters that a plan and a budget count are those that PEFT trains, whatever the config adds to A and B."""

import random
from itertools import pairwise

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig
from selecting import fingerprint
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import weightlora
from weightlora.errors import OptionError
from weightlora.methods import make_method
from weightlora.model.sites import adapter_parameters, find_sites
from weightlora.plan.budget import Budget, chosen_ranks
from weightlora.plan.limits import Limits
from weightlora.plan.plan import make_plan, read_adapter
from weightlora.selection.allocate import site_budget

KINDS = [{}, {"lora_bias": True}, {"use_dora": True}]  # PEFT refuses both at once


def any_net(rng: random.Random) -> nn.Sequential:
    """Two to six layers of any width."""
    widths = [rng.randint(1, 9) for _ in range(rng.randint(3, 7))]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("ignore:parameters=1.0")
@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_budgets_count_what_peft_trains(kind, tmp_path):
    for seed in range(40):
        rng = random.Random(seed)
        net = any_net(rng)
        lora = LoraConfig(r=rng.randint(1, 4), target_modules="all-linear", rank_pattern={"1": 2}, **kind)
        sites = find_sites(net, lora).sites
        sizes = adapter_parameters(sites, lora)
        every = make_plan(sites, lora, list(sizes))
        assert every.lora_sizes == tuple(sizes.values())
        assert every.parameters == every.lora_parameters == trained(every.attach(any_net(random.Random(seed))))
        if min(sizes.values()) > 0.5 * sum(sizes.values()):
            continue
        parameters = rng.choice([0.5, 0.9, 1.0, max(sizes.values())])
        budget = site_budget(sites, lora, Limits(parameters=parameters))
        chosen = budget.choose([rng.random() for _ in sites])
        plan = make_plan(sites, lora, [sites[i].name for i in chosen])
        assert plan.parameters <= budget.limit
        for one in (plan, plan.expand("parameters")):
            attached = one.attach(any_net(random.Random(seed)))
            assert trained(attached) == one.parameters <= one.lora_parameters
    one.save_adapter(attached, tmp_path / "adapter")
    (tmp_path / "adapter" / "plan.json").unlink()
    assert read_adapter(tmp_path / "adapter").parameters == one.parameters


@pytest.mark.parametrize("vectors", [0, 1])
def test_single_ranks_stay_within_the_budget_with_their_fixed_parameters(vectors):
    spent = []
    for seed in range(300):
        rng = random.Random(seed)
        outs = [rng.randint(1, 9) for _ in range(rng.randint(1, 6))]
        widths = [out + rng.randint(1, 9) for out in outs]
        ranks = [rng.randint(1, 5) for _ in outs]
        costs = [r * w + vectors * out for r, w, out in zip(ranks, widths, outs, strict=True)]
        limit = rng.randint(1, sum(costs))
        scores = [[rng.uniform(-0.2, 1) for _ in range(r)] for r in ranks]
        kept = chosen_ranks(Budget(tuple(costs), limit, tuple(vectors * out for out in outs)), scores)
        total = sum(r * w + vectors * out for r, w, out in zip(kept, widths, outs, strict=True) if r)
        assert total <= limit
        assert all(r <= sum(score > 0 for score in own) for r, own in zip(kept, scores, strict=True))
        spent.append(total / limit)
    assert sum(spent) / len(spent) > 0.5  # not by keeping nothing


def test_no_fixed_parameters_are_no_other_choice():
    for seed in range(200):
        rng = random.Random(seed)
        ranks = [rng.randint(1, 5) for _ in range(rng.randint(1, 6))]
        costs = tuple(r * rng.randint(1, 9) for r in ranks)
        scores = [[rng.uniform(-0.2, 1) for _ in range(r)] for r in ranks]
        limit = rng.randint(1, sum(costs))
        zeros = (0,) * len(ranks)
        assert chosen_ranks(Budget(costs, limit, zeros), scores) == chosen_ranks(Budget(costs, limit), scores)


def squared(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(batch["x"]) - 1).square().mean()


@pytest.mark.parametrize("rule", ["first_order", "integrated_ranks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_selection_keeps_its_budget(kind, rule):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    batches = [{"x": torch.randn(8, 6)} for _ in range(8)]
    lora = LoraConfig(r=2, target_modules="all-linear", **kind)
    fields = {"lora": lora, "rule": rule, "loss_fn": squared, "progress": False, "steps": 3, "learning_rate": 0.01}
    # An adapter has 2·12 parameters and a vector 6. Two adapters' matrices are 48: with vectors, fewer fit.
    plan = weightlora.select(net, batches, parameters=48, **fields)
    assert 0 < plan.parameters <= 48
    assert trained(plan.attach(net)) == plan.parameters


def test_bytes_count_the_biases_too():  # DoRA saves more than is counted, and is refused: tests/cost/test_cost.py
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    batches = [{"x": torch.randn(8, 6)} for _ in range(4)]
    sizes = []
    for kind in ({}, {"lora_bias": True}):
        lora = LoraConfig(r=2, target_modules="all-linear", **kind)
        plan = weightlora.select(net, batches, lora=lora, memory="1GB", loss_fn=squared, progress=False, steps=3)
        assert len(plan.names) == 6
        sizes.append(plan.options["peak_bytes"])
    # Six vectors of six fp32 numbers, each with a gradient and AdamW's two moments.
    assert sizes[1] - sizes[0] == 6 * 6 * 4 * 4


class Unread:
    """An iterable of batches of which none may be read."""

    def __iter__(self):
        raise AssertionError("a batch was read")


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))


def adapters_of(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("parameters", [1.0, 0.5, 0.1, 0.03, "half"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {r".*(query|q_proj)": 3}},
        {"target_parameters": True},
    ],
    ids=lambda fields: next(iter(fields), "plain"),
)
@pytest.mark.parametrize("name", ["minilm", "llama"])
@pytest.mark.filterwarnings("ignore:parameters=1.0")
def test_parameters_are_those_that_peft_trains_and_no_batch_is_read(name, fields, parameters, minilm):
    model, task = (minilm, "SEQ_CLS") if name == "minilm" else (tiny_llama(), "CAUSAL_LM")
    besides = {"minilm": "word_embeddings.weight", "llama": "embed_tokens.weight"}[name]
    fields = {"target_parameters": [besides]} if "target_parameters" in fields else fields
    lora = LoraConfig(r=8, task_type=task, target_modules="all-linear", **fields)
    if "target_parameters" in fields and not find_sites(model, lora).parameters:
        pytest.skip("no such parameter")
    before, state = fingerprint(model), torch.get_rng_state()
    most = find_sites(model, lora)
    whole = sum(adapter_parameters(most.sites, lora).values()) + sum(each.parameters for each in most.parameters)
    plan = weightlora.select(model, Unread(), lora=lora, parameters=whole // 2 if parameters == "half" else parameters)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert (plan.rule, plan.history, plan.lora_parameters) == ("uniform", (), whole)
    assert plan.options == {"parameters": whole // 2 if parameters == "half" else parameters}
    attached = plan.attach(model)
    assert adapters_of(attached) == plan.parameters
    besides = sum(each.parameters for each in plan.target_parameters)
    share = {"half": 0.5}.get(parameters, parameters)
    limit = share * whole if parameters == "half" else besides + share * (whole - besides)
    assert 0.7 * limit < plan.parameters <= limit + 1e-6  # the limit is spent but for less than a rank
    if parameters == 1.0:
        assert plan.parameters == whole


def test_quantised_weights_have_a_lower_rank_without_a_batch(quantised_net):
    before = fingerprint(quantised_net)
    plan = weightlora.select(quantised_net, Unread(), lora=LoraConfig(r=4), parameters=0.5)
    assert fingerprint(quantised_net) == before
    assert plan.ranks == {"0": 2, "2": 2}


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_weights_have_a_lower_rank_without_a_batch(offload, tmp_path):
    where = {} if offload is cpu_offload else {"offload_dir": str(tmp_path)}
    model = offload(tiny_llama(), execution_device=torch.device("cpu"), **where)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    plan = weightlora.select(model, Unread(), lora=lora, parameters=0.25)
    assert {*plan.ranks.values()} == {1}
    assert adapters_of(plan.attach(tiny_llama())) == plan.parameters == plan.lora_parameters // 4


def test_dora_with_a_bias_is_refused_in_one_line():
    lora = LoraConfig(r=2, target_modules="all-linear", lora_bias=True)
    with pytest.raises(OptionError, match="lora_bias=True is not allowed with DoRA"):
        make_method("dora").attach(nn.Sequential(nn.Linear(4, 4)), lora, (), 1)
