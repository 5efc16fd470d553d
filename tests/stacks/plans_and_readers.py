"""Small models, plans of them in every shape that matters to a configuration, and what each stack does with it.

The readers follow the sources of the versions in ``STACKS``; ``benchmarks/stacks.py`` runs the stacks' own parsers.
"""

import ast
import json
import math
import random

import torch
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, TrlParser, get_peft_config

from weightlora.model.layers import lora_layers
from weightlora.model.sites import Site, find_sites
from weightlora.plan.plan import AdapterPlan, PlannedSite

# -- models and plans ------------------------------------------------------------------------------------------------

LAYERS = 4


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, **sizes))


class Block(nn.Module):
    def __init__(self, *, inner: bool):
        super().__init__()
        self.proj = nn.Linear(8, 12)
        self.gate = nn.Linear(8, 12)
        if inner:
            self.inner = Block(inner=False)

    def forward(self, x):
        return self.proj(x)


def nested():
    """Names that are endings of others: ``proj`` and ``inner.proj``."""
    return Block(inner=True)


SITES = {make: find_sites(make()).sites for make in (llama, nested)}


def make_plan(make, ranks, alphas=16, **lora):
    """A plan of ``make()``: ranks by name, or by a number for all; the same with alphas."""
    sites = SITES[make]
    ranks = ranks if isinstance(ranks, dict) else {site.name: ranks for site in sites}
    alphas = alphas if isinstance(alphas, dict) else {site.name: alphas for site in sites}
    entries = (
        PlannedSite(site, 8, 16, r=ranks.get(site.name, 0), alpha=alphas.get(site.name, 16), score=1.0)
        for site in sites
    )
    return AdapterPlan(tuple(entries), lora=lora, seed=7)


def named(*ends, layers=range(LAYERS)):
    """Names of the Llama's sites with these ends, in these layers."""
    names = [site.name for site in SITES[llama]]
    return [n for n in names if n.endswith(tuple(f".{end}" for end in ends)) and int(n.split(".")[2]) in layers]


def ranks_of(names, *ranks):
    return {name: ranks[i % len(ranks)] for i, name in enumerate(names)}


HALF = named("q_proj", "v_proj", "down_proj", layers=(1, 3)) + named("o_proj", layers=(0,))
PLANS = {
    "one rank": (llama, make_plan(llama, ranks_of(HALF, 8), task_type="CAUSAL_LM")),
    "all sites": (llama, make_plan(llama, 8, lora_dropout=0.05)),
    "one site": (llama, make_plan(llama, ranks_of(named("v_proj", layers=(2,)), 4))),
    "2 of 28 sites": (llama, make_plan(llama, ranks_of(named("v_proj", layers=(1, 2)), 8))),
    "unequal ranks": (llama, make_plan(llama, ranks_of(HALF, 2, 4, 8))),
    "unequal alphas": (llama, make_plan(llama, ranks_of(HALF, 8), ranks_of(HALF, 4, 16))),
    "unequal ranks and alphas": (llama, make_plan(llama, ranks_of(HALF, 2, 4, 8), ranks_of(HALF, 16, 3))),
    "expanded": (llama, make_plan(llama, ranks_of(HALF, 8)).expand()),
    "rsLoRA": (llama, make_plan(llama, ranks_of(HALF, 8), use_rslora=True)),
    "rsLoRA, unequal ranks": (llama, make_plan(llama, ranks_of(HALF, 2, 8), use_rslora=True)),
    "alpha with a fraction": (llama, make_plan(llama, ranks_of(HALF, 8), 7.5)),
    "fractions": (llama, make_plan(llama, ranks_of(HALF, 8), ranks_of(HALF, 16, 7.5))),
    "ten layers' names": (llama, make_plan(llama, ranks_of(named("k_proj"), 8))),
    "a head": (llama, make_plan(llama, ranks_of(HALF, 8), modules_to_save=["lm_head"])),
    "endings": (nested, make_plan(nested, {"proj": 4})),
    "endings, unequal ranks": (nested, make_plan(nested, {"proj": 4, "inner.gate": 2})),
    "endings, all kept": (nested, make_plan(nested, {"proj": 4, "inner.proj": 2})),
    "some excluded": (llama, make_plan(llama, ranks_of(HALF, 8), exclude_modules=["k_proj"])),
    "some layers": (llama, make_plan(llama, ranks_of(HALF, 8), layers_to_transform=[0, 1, 3])),
}


def random_plan(seed):
    """Any sites of one of the models, with few or many ranks and alphas."""
    lot = random.Random(seed)
    make = lot.choice((llama, llama, nested))
    names = [site.name for site in SITES[make]]
    kept = lot.sample(names, lot.randint(1, len(names)))
    ranks, alphas = lot.choice(((8,), (1, 2, 8))), lot.choice(((16,), (4, 16), (3, 0.5)))
    lora = {
        name: value
        for name, value in (("use_rslora", True), ("lora_dropout", 0.1), ("task_type", "CAUSAL_LM"))
        if lot.random() < 0.3 and (make is llama or name != "task_type")
    }
    return make, make_plan(
        make, {name: lot.choice(ranks) for name in kept}, {name: lot.choice(alphas) for name in kept}, **lora
    )


def adapters(model):
    """Rank and scale of each adapter that PEFT has put into ``model``, by name."""
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in lora_layers(model).items()}


def planned(plan):
    """The same of a plan, by PEFT's definition of the scale."""
    root = math.sqrt if plan.lora.get("use_rslora") else float
    return {e.site.name: (e.r, e.alpha / root(e.r)) for e in plan.entries if e.r > 0}


def encoder_plan(names, **lora):
    """A plan whose sites are not a Llama's."""
    entries = tuple(PlannedSite(Site(name, 8, 8), 8, 16, r=8, alpha=16, score=1.0) for name in names)
    return AdapterPlan(entries, lora=lora)


# -- stacks: the options they read, and their call of PEFT -----------------------------------------------------------


def _call(text, function):
    """The arguments of the one call of ``function``, and its assigned name."""
    (call,) = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    ]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def read_peft(model, text):
    return get_peft_model(model, LoraConfig(**_call(text, "LoraConfig")))


def read_trl(model, text, path):
    if "import" in text:
        return read_peft(model, text)
    path.write_text(text)
    (arguments,) = TrlParser([ModelConfig]).parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    config = get_peft_config(arguments)
    config.task_type = yaml.safe_load(text).get("lora_task_type")  # TRL trains language models alone
    return get_peft_model(model, config)


def read_axolotl(model, text):
    """``axolotl.loaders.adapter.load_lora``."""
    found = yaml.safe_load(text)
    assert found.pop("adapter") == "lora"
    if "lora_model_dir" in found:
        return PeftModel.from_pretrained(model, found.pop("lora_model_dir"), is_trainable=True)
    assert found.pop("lora_target_linear") is False
    if "lora_modules_to_save" in found:
        found["lora_modules_to_save"] = list(found["lora_modules_to_save"])
    for name in ("lora_r", "lora_alpha"):
        assert isinstance(found[name], int)
    fields = {name.removeprefix("lora_").removeprefix("peft_"): value for name, value in found.items()}
    fields["lora_alpha"], fields["lora_dropout"] = fields.pop("alpha"), fields.pop("dropout")
    return get_peft_model(model, LoraConfig(**fields))


def read_llamafactory(model, text):
    """``llamafactory.model.adapter._setup_lora_tuning``."""
    found = yaml.safe_load(text)
    assert found.pop("finetuning_type") == "lora"
    if "adapter_name_or_path" in found:
        assert found["create_new_adapter"] is False
        return PeftModel.from_pretrained(model, found["adapter_name_or_path"], is_trainable=True)
    head = found.pop("additional_target", None)
    assert isinstance(found["lora_alpha"], int)
    names = [name.strip() for name in found.pop("lora_target").split(",")]
    fields = {"target_modules": names, "modules_to_save": head and head.split(","), "r": found.pop("lora_rank")}
    return get_peft_model(model, LoraConfig(**fields, **found))


def read_swift(model, text):
    """``swift.pipelines.train.tuner``."""
    found = yaml.safe_load(text)
    assert found.pop("tuner_type") == "lora"
    if "adapters" in found:
        (folder,) = found["adapters"]
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    pattern = found.pop("target_regex", None)
    found["target_modules"] = pattern or found["target_modules"]
    return get_peft_model(model, LoraConfig(r=found.pop("lora_rank"), **found))


def read_unsloth(model, text):
    """``unsloth.FastLanguageModel.get_peft_model``, which asserts a whole ``r`` and gives the rest to PEFT."""
    fields = _call(text, "FastLanguageModel.get_peft_model")
    assert type(fields["r"]) is int
    return get_peft_model(model, LoraConfig(**fields))


def read_benchmark(model, text):
    """As run.py of PEFT's method comparison does: the folder's configuration, on the base model."""
    return get_peft_model(model, PeftConfig.from_peft_type(**json.loads(text)))


READ = {
    "peft": read_peft,
    "peft-benchmark": read_benchmark,
    "axolotl": read_axolotl,
    "llamafactory": read_llamafactory,
    "swift": read_swift,
    "unsloth": read_unsloth,
}
#: Names of a Llama's projections by the words of a stack that adapts whole types.
WORDS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "output_proj": "o_proj",
    "lora_query": "q_proj",
    "lora_key": "k_proj",
    "lora_value": "v_proj",
    "lora_projection": "o_proj",
}
MLP = ("gate_proj", "up_proj", "down_proj")


def read_types(stack, text):
    """Projections, rank and scale that torchtune or LitGPT gives to every layer."""
    found = yaml.safe_load(text)
    if stack == "torchtune":
        model = found["model"]
        kept, mlp, r = model["lora_attn_modules"], model["apply_lora_to_mlp"], model["lora_rank"]
        found = model
    else:
        kept = [word for word in WORDS if found.get(word) is True]
        mlp, r = found["lora_mlp"], found["lora_r"]
    return {*(WORDS[word] for word in kept), *(MLP if mlp else ())}, r, found["lora_alpha"] / r
