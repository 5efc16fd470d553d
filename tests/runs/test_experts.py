"""A recipe with ``all-linear`` puts the adapters on a mixture of experts that PEFT would put there."""

from types import SimpleNamespace

from architectures import model_of
from peft import LoraConfig, get_peft_model

from weightlora.model.layers import adapter_ranks
from weightlora.runs._load import _with_lora
from weightlora.runs.recipe import MethodOptions

ALL = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def test_a_recipe_adapts_what_peft_adapts():
    options = MethodOptions(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules=["all-linear"])
    unquantised = SimpleNamespace(load_in_8bit=False, load_in_4bit=False)
    model = _with_lora(model_of("OLMoE"), SimpleNamespace(method=options, model=unquantised), "CAUSAL_LM")
    plain = adapter_ranks(get_peft_model(model_of("OLMoE"), LoraConfig(**ALL)))
    assert adapter_ranks(model) == plain
    assert sum("experts" in name for name in plain) == 4  # two layers, two parameters each
