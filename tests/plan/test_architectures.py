"""Small models of many architectures: select, attach, train, save, load with stock PEFT, merge; what cannot is refused.

The refusal comes before a batch is read. Where plain PEFT works, so does a plan of the same targets.
"""

import copy
import json
import warnings

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    FAMILIES,
    HEADER,
    PAGE,
    agree,
    batch_of,
    endings,
    fused,
    model_of,
    outcome,
    plain_works,
    row,
    selected,
    trained_and_loaded,
)
from peft import LoraConfig, get_peft_model
from selecting import fingerprint
from transformers import Trainer, TrainingArguments

import weightlora
from weightlora.errors import OptionError, PlanError, PlanMismatchError, SiteError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.model.layers import adapter_ranks
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan, make_plan

ALL = {"r": 2, "target_modules": "all-linear"}
EXPERTS = [name for name in FAMILIES["mixture of experts"] if fused(model_of(name))]


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def states(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# -- the matrix --------------------------------------------------------------------------------------------------------


def test_the_matrix_is_large_enough():
    kinds = {kind for _, kind, _ in ARCHITECTURES.values()}
    assert len(kinds) == len(ARCHITECTURES) >= 40
    assert min(len(models) for models in FAMILIES.values()) >= 5


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_loads_and_merges_with_stock_peft(name):
    """And the table in the documents says what is found here."""
    state, plain = outcome(name)
    assert state == "works"
    assert row(name, state, plain) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.sampled(8)
@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_is_what_peft_adapts_or_what_the_warning_names(name):
    lora = LoraConfig(**ALL)
    plan, model, warned = selected(name, lora, adapters=0.5)
    before = states(model)
    assert not model.training
    every = find_sites(model, lora)
    whole = make_plan(every.sites, lora, [site.name for site in every.sites], target_parameters=every.parameters)
    attached = whole.attach(model_of(name))
    assert trained(attached) == whole.parameters
    left_out = {skip.name for skip in every.skipped}
    try:
        plain = adapter_ranks(get_peft_model(model_of(name), copy.deepcopy(lora)))
    except ValueError:  # it refuses one of the layers, which the warning names
        assert warned
    else:
        ours = adapter_ranks(attached)
        assert plain.keys() - ours.keys() <= left_out
        assert {key: plain[key] for key in ours} == ours  # nothing that PEFT would not adapt, and with PEFT's ranks
    reread = {skip.name for skip in every.skipped if "PEFT" in skip.reason or "tensor" in skip.reason}
    assert bool(reread) == bool(warned)
    expanded = plan.expand("parameters")
    assert expanded.parameters <= plan.lora_parameters
    assert expanded.target_parameters == plan.target_parameters == every.parameters
    if every.parameters:  # without them the first test has done this
        attached = expanded.attach(model)
        assert trained(attached) == expanded.parameters
        assert agree(trained_and_loaded(name, attached))
    else:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_documents_have_the_table_and_no_other_lines():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    models = [line.split(" | ")[0] for line in lines if line.startswith("| ") and not HEADER.startswith(line)]
    assert [model for model in models if "---" not in model] == [f"| {name}" for name in ARCHITECTURES]
    assert "\n".join(lines).count(HEADER) == len(FAMILIES)


# -- fused experts -----------------------------------------------------------------------------------------------------


def on_request(name):
    """LoRA on the layers that PEFT adapts and on every fused expert."""
    model = model_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightLoraWarning)
        ends = {site.name.rsplit(".", 1)[-1] for site in find_sites(model).sites}
    return LoraConfig(r=2, lora_alpha=3, target_modules=sorted(ends), target_parameters=endings(fused(model)))


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_carried_and_counted(name, tmp_path):
    lora = on_request(name)
    plan, model, _ = selected(name, lora, adapters=0.5)
    assert [each.name for each in plan.target_parameters] == fused(model)
    plain = get_peft_model(model_of(name), copy.deepcopy(lora))
    assert trained(plain) == plan.lora_parameters
    assert plan.parameters > sum(each.parameters for each in plan.target_parameters) > 0
    plan.save(tmp_path / "plan.json")
    assert AdapterPlan.load(tmp_path / "plan.json") == plan
    for one in (plan, plan.expand("parameters")):
        attached = one.attach(model_of(name))
        assert trained(attached) == one.parameters <= one.lora_parameters
        ranks = adapter_ranks(attached)
        assert {ranks[each.name] for each in one.target_parameters} == {2}
        assert agree(trained_and_loaded(name, attached)) or not plain_works(name, lora)
    again = weightlora.select(plain, [batch_of(name, seed) for seed in range(2)], steps=2, progress=False)
    assert again == plan
    assert again.attach(plain) is plain
    assert trained(plain) == plan.parameters


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
@pytest.mark.parametrize("method", ["lora", "random", "dot_product", "eva", "lora_drop", "flexora", "weightlora_plus"])
def test_methods_that_choose_carry_them_too(method):
    options = {"steps": 2} if method in ("dot_product", "eva", "lora_drop", "flexora", "weightlora_plus") else {}
    made = make_method(method, **options)
    batches = [batch_of("OLMoE", seed) for seed in range(10)]
    attached = made.attach(model_of("OLMoE"), LoraConfig(**ALL), batches, 20)
    assert trained(attached) == made.plan.parameters
    assert {each.name.rsplit(".", 1)[-1] for each in made.plan.target_parameters} == {
        "gate_up_proj",
        "down_proj",
        "weight",
    }
    assert made.export(attached) is attached


@pytest.mark.filterwarnings("ignore:adapters=1.0")
def test_a_number_of_parameters_is_for_all_adapters():
    plan, _, _ = selected("OLMoE", LoraConfig(**ALL), adapters=1.0)
    besides = sum(each.parameters for each in plan.target_parameters)
    smaller, _, _ = selected("OLMoE", LoraConfig(**ALL), parameters=besides + 200, rule="first_order")
    assert besides < smaller.parameters <= besides + 200


@pytest.mark.parametrize("fast", [None, "input"])
@pytest.mark.filterwarnings("ignore:the fast step does not cover 6 of:weightlora.errors.WeightLoraWarning")
@pytest.mark.filterwarnings("error:The following:RuntimeWarning")
def test_a_trainer_trains_and_resumes_them(fast, tmp_path):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 16
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_steps": 1}

    def made(steps):
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, per_device_train_batch_size=4, **quiet)
        trainer = Trainer(model_of("OLMoE"), arguments, train_dataset=rows)
        options = {"adapters": 0.5, "steps": 2, "fast": fast, "lora": LoraConfig(**ALL, task_type="CAUSAL_LM")}
        return trainer, weightlora.method_for(trainer, "selected", **options)

    trainer, method = made(2)
    trainer.train()
    again, resumed = made(3)
    assert resumed.plan == method.plan
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert trained(method.export(trainer.model)) == method.plan.parameters
    moved = dict(again.model.named_parameters())
    assert any(p.any() for name, p in moved.items() if "experts.lora_B" in name)


# -- refused before a batch is read ------------------------------------------------------------------------------------


def unread():
    raise AssertionError("a batch was read")
    yield


@pytest.mark.parametrize(
    ("name", "fields", "options", "error", "text"),
    [
        ("OLMoE", {**ALL, "lora_dropout": 0.1}, {}, OptionError, "does not work with lora_dropout != 0"),
        ("OLMoE", {**ALL, "use_dora": True}, {}, OptionError, "use_dora=True"),
        ("OLMoE", {**ALL, "lora_bias": True}, {}, OptionError, "lora_bias=True"),
        ("OLMoE", ALL, {"memory": "1GB"}, OptionError, "cannot be measured with target_parameters"),
        ("OLMoE", ALL, {"time": 0.8, "rule": "first_order"}, OptionError, "cannot be measured with target_parameters"),
        ("OLMoE", ALL, {"parameters": 100, "rule": "first_order"}, OptionError, "leaves nothing beside 2,"),
        ("DeepSeek-V3", {"target_modules": ["o_proj", "gate_proj"]}, {}, OptionError, "without also targeting up_proj"),
        ("Mixtral", {"target_modules": ["w1", "w2", "w3"]}, {}, SiteError, "fused experts alone"),
        ("Mixtral", {"target_modules": ["q_proj"], "target_parameters": ["norm.weight"]}, {}, SiteError, "1 dimension"),
        ("Mamba", {"target_modules": ["out_proj"]}, {}, SiteError, "PEFT refuses 'out_proj'"),
        ("Llama 4", {"target_modules": ["router"]}, {}, SiteError, "returns more than one tensor"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_a_batch_is_read(name, fields, options, error, text):
    model = model_of(name)
    before = states(model)
    with pytest.raises(error, match=text) as caught:
        weightlora.select(model, unread(), lora=LoraConfig(**fields), steps=2, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dora_of_experts_is_refused():
    with pytest.raises(OptionError, match="use_dora=True"):
        make_method("dora").attach(model_of("OLMoE"), LoraConfig(**ALL), unread(), 20)


@pytest.mark.parametrize("method", ["adalora", "vera", "riemannian", "pruned_lora", "full"])
def test_other_methods_refuse_them(method):
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.raises(OptionError, match=r"experts.down_proj.*adapts layers only"):
        make_method(method).attach(model_of("OLMoE"), lora, unread(), 20)


def test_a_name_that_no_parameter_has_is_warned_about():
    lora = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_prj"])
    with pytest.warns(WeightLoraWarning, match="experts.down_prj: no parameter has this name"):
        assert find_sites(model_of("Mixtral"), lora).parameters == ()


@pytest.mark.parametrize("name", ["Llama 4", "Mamba", "OLMoE"])
@pytest.mark.filterwarnings("ignore:target_modules asks")
def test_asking_peft_leaves_no_trace(name):
    model = model_of(name).train()
    before = fingerprint(model)
    find_sites(model, LoraConfig(**ALL))
    assert fingerprint(model) == before


def test_excluded_layers_are_not_warned_about():
    find_sites(model_of("Mamba"), LoraConfig(exclude_modules=["out_proj"]))  # warnings are errors


def test_a_plan_fits_a_model_with_the_same_experts_only():
    plan, _, _ = selected("OLMoE", LoraConfig(**ALL))
    other = model_of("OLMoE")
    experts = other.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach()[:3])
    with pytest.raises(PlanMismatchError, match=r"experts.down_proj: \(3, 16, 24\) in the model, \(4, 16, 24\)"):
        plan.attach(other)
    with pytest.raises(OptionError, match="target_parameters"):
        plan.to_lora_config(target_parameters=[])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4]},
        {"shape": [4, 0, 2]},
        {"shape": "big"},
        {"r": 0},
        {"r": True},
        {"alpha": -1},
        {"name": ""},
        {"name": "a\nb"},
        {"more": 1},
    ],
)
def test_a_damaged_row_of_experts_is_refused(change, tmp_path):
    plan, _, _ = selected("OLMoE", LoraConfig(**ALL))
    path = tmp_path / "plan.json"
    plan.save(path)
    data = json.loads(path.read_text())
    data["target_parameters"][0] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="is not a valid plan") as caught:
        AdapterPlan.load(path)
    assert "\n" not in str(caught.value)
