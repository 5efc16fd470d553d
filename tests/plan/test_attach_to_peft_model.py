"""``plan.attach`` on a model that PEFT has wrapped already: the adapters are replaced, or nothing is touched."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from selecting import fingerprint
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import weightlora
from weightlora.errors import OptionError, PlanMismatchError
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan, make_plan

TARGETS = ["q_proj", "v_proj", "up_proj"]
KINDS = {
    "plain": {},
    "task": {"task_type": "CAUSAL_LM"},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"up_proj": 6}},
}


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=layers, **shape))


def wrapped(**lora) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS, **lora))


def plan_of(model: nn.Module, **lora) -> AdapterPlan:
    """The plan that keeps every second site."""
    config = LoraConfig(r=4, target_modules=TARGETS, **lora)
    sites = find_sites(model, config).sites
    return make_plan(sites, config, [site.name for site in sites[::2]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16).reshape(2, 8)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_object_carries_the_plan_and_is_saved_as_stock_lora(kind, tmp_path):
    model = wrapped(**KINDS[kind])
    before = logits(model)
    plan = plan_of(model, **KINDS[kind])
    assert plan.attach(model) is model
    base = model.get_base_model()
    assert sorted(name for name, m in base.named_modules() if isinstance(m, LoraLayer)) == list(plan.names)
    torch.testing.assert_close(logits(model), before)  # B = 0; DoRA divides by the norm that it multiplies with
    for layer in lora_layers(model).values():
        nn.init.constant_(layer.lora_B["default"].weight, 0.1)
    trained = logits(model)
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), trained)
    found = {key.split(".lora_")[0] for key in load_file(tmp_path / "adapter_model.safetensors") if ".lora_" in key}
    assert found == {f"base_model.model.{name}" for name in plan.names}


def test_a_plan_selected_on_a_peft_model_is_attached_to_it():
    model = wrapped(task_type="CAUSAL_LM")
    ids = torch.arange(16).reshape(2, 8)
    plan = weightlora.select(model, [{"input_ids": ids, "labels": ids}] * 2, adapters=2, steps=2, progress=False)
    assert plan.expand().attach(model) is model
    assert list(lora_layers(model)) == list(plan.names)
    assert model.get_nb_trainable_parameters()[0] == plan.expand().parameters


@pytest.mark.filterwarnings("error:`is_gradient_checkpointing`:FutureWarning")
def test_a_word_of_transformers_to_peft_is_not_shown():
    model, ids = llama(), torch.arange(16).reshape(2, 8)
    plan = weightlora.select(model, [{"input_ids": ids, "labels": ids}] * 2, adapters=2, steps=2, progress=False)
    plan.attach(model)


def test_a_further_attach_replaces_the_plan_before():
    model = llama()
    plan = plan_of(model)
    attached = plan.attach(model)
    assert plan.expand().attach(attached) is attached
    assert {name: layer.r["default"] for name, layer in lora_layers(attached).items()} == {
        name: r for name, r in plan.expand().ranks.items() if r
    }


# -- refused before anything is touched --------------------------------------------------------------------------------


def trained_b() -> nn.Module:
    model = wrapped()
    nn.init.constant_(next(iter(lora_layers(model).values())).lora_B["default"].weight, 0.1)
    return model


def trained_bias() -> nn.Module:
    model = wrapped(lora_bias=True)
    nn.init.constant_(next(iter(lora_layers(model).values())).lora_B["default"].bias, 0.1)
    return model


def trained_embedding() -> nn.Module:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]))
    nn.init.constant_(model.get_base_model().model.embed_tokens.lora_embedding_A["default"], 0.1)
    return model


def trained_head() -> nn.Module:
    model = wrapped(modules_to_save=["lm_head"])
    (head,) = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    nn.init.constant_(head.modules_to_save["default"].weight, 0.1)
    return model


def trained_tokens() -> nn.Module:
    model = wrapped(trainable_token_indices=[1, 2])
    embedding = model.get_base_model().model.embed_tokens
    nn.init.constant_(embedding.token_adapter.trainable_tokens_delta["default"], 0.1)
    return model


def two_adapters() -> nn.Module:
    model = wrapped()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    return model


REFUSED = {
    "trained": (trained_b, OptionError, "is not zero"),
    "trained bias": (trained_bias, OptionError, "is not zero"),
    "trained embedding": (trained_embedding, OptionError, "embed_tokens"),
    "trained head": (trained_head, OptionError, "lm_head .* differs"),
    "trained tokens": (trained_tokens, OptionError, "embed_tokens.* differs"),
    "two adapters": (two_adapters, OptionError, "default, second"),
    "another name": (
        lambda: get_peft_model(llama(), LoraConfig(target_modules=TARGETS), adapter_name="mine"),
        OptionError,
        "adapters mine, no LoRA named 'default'",
    ),
    "IA3": (
        lambda: get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        OptionError,
        "no LoRA",
    ),
    "another task": (lambda: wrapped(task_type="CAUSAL_LM"), OptionError, "task_type"),
    "no PeftModel": (
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama()),
        OptionError,
        "without being a PeftModel",
    ),
    "another model": (
        lambda: get_peft_model(llama(1), LoraConfig(target_modules=TARGETS)),
        PlanMismatchError,
        "not in the model",
    ),
}


def state(model: nn.Module):
    """Everything of the model; the random states are those of fresh adapters."""
    return {key: value for key, value in fingerprint(model).items() if key != "random"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_in_one_line_and_the_model_is_untouched(case):
    build, error, text = REFUSED[case]
    model = build()
    before = state(model)
    with pytest.raises(error, match=text) as caught:
        plan_of(llama()).attach(model)
    assert "\n" not in str(caught.value)
    assert state(model) == before


@pytest.mark.parametrize("build", [llama, wrapped])
def test_an_error_of_peft_leaves_the_model_as_it_was(build):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match="nonsense"):  # PEFT notices it when the first layer is made
        plan_of(model).attach(model, init_lora_weights="nonsense")
    assert state(model) == before


def test_a_selection_does_not_begin_on_adapters_that_nothing_takes_off():
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama())
    before = state(model)
    with pytest.raises(OptionError, match="without being a PeftModel"):
        weightlora.select(model, [{"input_ids": torch.arange(8).reshape(1, 8)}], steps=2, progress=False)
    assert state(model) == before


# -- PEFT combines adapters of plans in memory: ``add_weighted_adapter`` ---------------------------------------------

RANKS = {"a": 2, "b": 4, "c": 0, "d.a": 0}


class Net(nn.Module):
    """Four sites; a kept ``a`` is the ending of ``d.a``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in "abcd")
        self.d = nn.ModuleDict({"a": nn.Linear(6, 6)})

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x) + self.d["a"](x)


def plan_with(ranks):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b", "c"], init_lora_weights=False)
    kept = [name for name, r in ranks.items() if r]
    return make_plan(find_sites(Net(), lora).sites, lora, kept, ranks=ranks)


def updates(model, adapter):
    return {n: layer.get_delta_weight(adapter) for n, layer in lora_layers(model, adapter).items()}


@pytest.mark.parametrize("attached_by", ["attach", "get_peft_model"])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_combined_adapter_is_the_weighted_sum(attached_by, kind, tmp_path):
    torch.manual_seed(0)
    first, second = plan_with(RANKS), plan_with({**RANKS, "b": 0, "c": 4})
    model = first.attach(Net()) if attached_by == "attach" else get_peft_model(Net(), first.to_lora_config())
    model.add_adapter("second", second.to_lora_config())
    one, two = (updates(model, name) for name in ("default", "second"))
    model.add_weighted_adapter(
        ["default", "second"],
        [0.5, 2.0],
        "both",
        combination_type=kind,
        svd_rank=6,  # the layer's, so that nothing is cut
    )
    both = updates(model, "both")
    assert both.keys() == one.keys() | two.keys()
    for name, delta in both.items():
        zero = torch.zeros(6, 6)
        total = 0.5 * one.get(name, zero) + 2 * two.get(name, zero)
        torch.testing.assert_close(delta, total, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    for folder, sites in ((".", one), ("both", both)):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(sites)
        assert config["peft_type"] == "LORA"
