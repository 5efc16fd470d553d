"""The registry of methods, and what they trained as stock LoRA."""

import random
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from selecting import ruled
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import weightlora
from weightlora.errors import OptionError, PlanError, PlanMismatchError
from weightlora.methods import METHODS, make_method, options_of
from weightlora.methods.families.export import Factors, become_stock, factors_plan
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan
from weightlora.selection.rules.first_order import FirstOrder

NAMES = [entry.name for entry in METHODS]
LORA = LoraConfig(r=4, lora_alpha=8)
QUICK = {
    "steps": 3,
    "rule": FirstOrder(head_steps=2),
    "progress": False,
}  # six batches are enough, so nothing is used twice


def llama() -> LlamaForCausalLM:
    """14 sites in four shapes."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape))


def adapters(model: PeftModel) -> dict[str, int]:
    base = model.get_base_model()
    return {name: m.r["default"] for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def drawn(seed: int, *, lora: LoraConfig = LORA, **limits):
    method = make_method("random", seed=seed, **(limits or {"adapters": 5}))
    method.attach(llama(), lora, [], 100)
    return method.plan


# -- the registry ----------------------------------------------------------------------------------------------------


def test_the_registry_and_the_files_are_the_same():
    files = {path.stem for path in (Path(weightlora.__file__).parent / "methods").glob("*.py")}
    assert files - {"__init__", "base"} == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("entry", METHODS, ids=NAMES)
def test_every_method_is_built_from_its_name_and_speaks_the_protocol(entry):
    assert callable(import_module(f"weightlora.methods.{entry.name}").build)
    assert entry.summary
    assert entry.paper
    method = make_method(entry.name)
    for verb in ("attach", "callbacks", "export"):
        assert callable(getattr(method, verb))
    assert all(isinstance(callback, TrainerCallback) for callback in method.callbacks())


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("weightlor", {}, "'weightlora'"),
        ("rondom", {}, "'random'"),
        ("xyz", {}, "there are full, lora, random"),
        ("rlora", {}, "'random'"),
        ("random", {"adaptrs": 0.5}, "'adapters'"),
        ("random", {"sed": 1}, "'seed'"),
        ("lora", {"adapters": 0.5}, "lora has no option 'adapters'"),
        ("selected", {"tim": 0.5}, "'time'"),
        ("weightlora_plus", {"serd": 1}, "'seed'"),
        ("adalora", {"alhpa": "keep"}, "'alpha'"),
    ],
)
def test_an_unknown_method_or_option_is_one_line_that_names_the_closest(name, options, text):
    with pytest.raises(OptionError) as caught:
        make_method(name, **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# -- plain LoRA ------------------------------------------------------------------------------------------------------


def test_lora_is_rank_r_on_all_sites():
    method = make_method("lora")
    model = method.attach(llama(), LORA, [], 100)
    assert adapters(model) == {site.name: 4 for site in find_sites(llama(), LORA).sites}
    assert method.plan.parameters == method.plan.lora_parameters
    assert method.plan.rule == "lora"


# -- the control -----------------------------------------------------------------------------------------------------


def test_random_keeps_k_sites_and_counts_their_parameters():
    method = make_method("random", adapters=5, seed=3)
    model = method.attach(llama(), LORA, [], 100)
    assert adapters(model) == dict.fromkeys(method.plan.names, 4)
    assert len(method.plan.names) == 5
    assert method.plan.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (method.plan.rule, method.plan.seed, method.plan.options) == ("random", 3, {"adapters": 5})


def test_the_draw_depends_on_the_seed_alone():
    random.seed(1)
    torch.manual_seed(1)
    one = drawn(0).names
    random.seed(2)
    torch.manual_seed(2)
    state = random.getstate()
    assert drawn(0).names == one
    assert random.getstate() == state
    assert len({drawn(seed).names for seed in range(10)}) > 5


@pytest.mark.slow
def test_every_site_is_drawn_equally_often():
    draws, k, n = 200, 5, 14
    counts = Counter(name for seed in range(draws) for name in drawn(seed, adapters=k).names)
    mean = draws * k / n
    deviation = (mean * (1 - k / n)) ** 0.5
    assert len(counts) == n
    assert all(abs(count - mean) < 4 * deviation for count in counts.values())


def test_a_parameter_budget_is_spent_and_not_exceeded():
    for seed in range(10):
        plan = drawn(seed, parameters=600)
        left = 600 - plan.parameters
        assert left >= 0
        assert all(e.site.parameters(e.lora_r) > left for e in plan.entries if e.r == 0), "another would have fitted"


def test_a_parameter_budget_also_holds_under_a_rank_pattern():
    lora = LoraConfig(r=4, rank_pattern={"q_proj": 16})
    assert all(drawn(seed, parameters=600, lora=lora).parameters <= 600 for seed in range(10))


# -- WeightLoRA ------------------------------------------------------------------------------------------------------


def quick(name):
    return {key: value for key, value in QUICK.items() if key in options_of(name)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "rule"), [("selected", "first_order"), ("weightlora", "paper"), ("weightlora_plus", "paper")]
)
def test_a_selection_is_in_force_after_attach_and_export_returns_stock_lora(minilm, review_batches, name, rule):
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")
    own = ruled(rule, head_steps=2) if name == "selected" else {"threshold_every": 3}
    method = make_method(name, adapters=9, seed=5, **{**quick(name), **own})
    model = method.attach(minilm, lora, review_batches, 100)
    plan = method.plan
    assert (len(plan.entries), len(plan.names)) == (36, 9)
    assert (plan.rule, plan.seed, plan.options["adapters"], plan.options["steps"]) == (rule, 5, 9, 3)
    assert adapters(model) == {name: plan.ranks[name] for name in plan.names}
    # The kept are those with the largest scores: of all, or of each block where the rule spreads them.
    parts, counts = ([f".layer.{block}." for block in range(6)], {1, 2}) if rule == "first_order" else ([""], {9})
    for part in parts:
        kept = [score for n, score in plan.scores.items() if part in n and n in plan.names]
        others = [score for n, score in plan.scores.items() if part in n and n not in plan.names]
        assert min(kept) >= max(others)
        assert len(kept) in counts
    if name == "weightlora_plus":
        assert set(plan.ranks.values()) == {0, 4 * 36 // 9}  # section 2.2
        assert plan == plan.expand()
    else:
        assert set(plan.ranks.values()) == {0, 4}
    exported = method.export(model)
    assert exported is model
    assert exported.peft_config["default"].target_modules == set(plan.names)
    assert not any(module._forward_hooks for module in exported.modules()), "no gate is left"


def test_both_choose_the_same_sites(minilm, review_batches):
    plans = []
    for name in ("weightlora", "weightlora_plus"):
        method = make_method(name, adapters=9, **quick(name))
        model = method.attach(minilm, LoraConfig(r=4, task_type="SEQ_CLS"), review_batches, 100)
        minilm = model.unload()  # select() leaves the model as it was, attach() does not
        plans.append(method.plan)
    assert plans[0].names == plans[1].names
    assert plans[0].expand() == plans[1]


def test_the_scoring_follows_from_the_length_of_the_training(minilm, review_batches):
    method = make_method("selected", adapters=9, rule="first_order", progress=False)
    batches = [
        {key: tensor[:1, :4] if tensor.ndim == 2 else tensor[:1] for key, tensor in review_batches[0].items()}
    ] * 26
    method.attach(minilm, LoraConfig(r=2), batches, 5001)  # no head is trained: no task type
    assert method.plan.options["steps"] == 26  # 0.5 % of 5001, rounded up
    assert len(method.plan.history) == 26


def test_export_refuses_a_model_that_does_not_carry_the_plan():
    method = make_method("random", adapters=5)
    method.attach(llama(), LORA, [], 100)
    other = make_method("random", adapters=6).attach(llama(), LORA, [], 100)
    with pytest.raises(PlanMismatchError):
        method.export(other)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_before_attach_is_a_clear_error(name):
    with pytest.raises(PlanError, match=r"no plan yet; call attach\(\) or weightlora.method_for"):
        _ = make_method(name).plan


# -- stock LoRA: the same ΔW, with one whole ``lora_alpha`` ----------------------------------------------------------


def exported(scales, ranks, lora_alpha):
    """The model and its config, and what was to be exported."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in scales))
    lora = LoraConfig(r=4, lora_alpha=lora_alpha)
    plan = make_plan(find_sites(net, lora).sites, lora, [str(i) for i in range(len(scales))])
    factors = {
        str(i): Factors(torch.randn(r, 6), torch.randn(6, r), s)
        for i, (s, r) in enumerate(zip(scales, ranks, strict=True))
    }
    model = get_peft_model(net, LoraConfig(target_modules=[str(i) for i in range(len(scales))]))
    plan = factors_plan(plan, factors)
    become_stock(model, plan, factors)
    plan.check(model)
    return model, model.peft_config["default"], factors


@pytest.mark.parametrize(
    ("scales", "ranks", "lora_alpha", "alpha"),
    [
        ((2.0, 2.0), (4, 4), 8, 8),  # scale·r = 8 on both
        ((4.0, 2.0), (2, 4), 3, 8),  # here as well, whatever plain LoRA's is
        ((10 / 49, 10 / 49), (49, 49), 8, 10),  # 10/49·49 = 9.999999999999998 in float64
        ((2.0, 2.0), (4, 1), 8, 8),  # 8 and 2: plain LoRA's
        ((10 / (5 + 1e-5),) * 2, (5, 5), 10, 10),  # 9.99998 with PEFT's AdaLoRA
        ((0.3, 0.7, 1.0), (1, 0, 5), 16, 16),
        ((0.3, 0.7), (1, 2), 2.4, 2),  # a whole one, also where the user's is not
        ((0.3, 0.7), (1, 2), 0.25, 1),
    ],
)
def test_one_whole_alpha_and_the_same_update(scales, ranks, lora_alpha, alpha):
    model, config, factors = exported(scales, ranks, lora_alpha)
    assert (config.lora_alpha, type(config.lora_alpha), config.alpha_pattern) == (alpha, int, {})
    layers = lora_layers(model)
    assert layers.keys() == {name for name, factor in factors.items() if factor.rank}
    for name, layer in layers.items():
        expected = factors[name].scale * factors[name].b.double() @ factors[name].a.double()
        b, a = (part["default"].weight.double() for part in (layer.lora_B, layer.lora_A))
        torch.testing.assert_close(config.lora_alpha / factors[name].rank * b @ a, expected, rtol=1e-5, atol=1e-5)
        if factors[name].scale * factors[name].rank == alpha:  # nothing to fold: not one bit of B differs
            assert torch.equal(layer.lora_B["default"].weight, factors[name].b)
