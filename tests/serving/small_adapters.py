"""A small Llama, adapters of it in every shape that plans have, and what each runtime computes with them.

The rules are those of the runtimes' own code, which ``benchmarks/readers`` runs.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

LAYERS = 3
TOKENS = torch.arange(24)[None]


def site(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def everywhere(*names: str) -> list[str]:
    return [site(layer, name) for layer in range(LAYERS) for name in names]


ALL = everywhere("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOLES = [site(0, "q_proj"), site(1, "v_proj"), site(1, "o_proj"), site(2, "up_proj"), site(2, "down_proj")]
#: Fields of LoraConfig by the name of the adapter.
SHAPES = {
    "uniform": {"target_modules": ALL},
    "holes": {"target_modules": HOLES},
    "v only": {"target_modules": everywhere("v_proj")},
    "q and v": {"target_modules": everywhere("q_proj", "v_proj")},
    "gate only": {"target_modules": everywhere("gate_proj")},
    "up only": {"target_modules": everywhere("up_proj")},
    "k in one layer": {"target_modules": [*everywhere("q_proj", "v_proj"), site(1, "k_proj")]},
    "ranks": {"target_modules": ALL, "rank_pattern": {site(1, "q_proj"): 2}},
    "ranks, one scale": {
        "target_modules": ALL,
        "rank_pattern": {site(1, "q_proj"): 2},
        "alpha_pattern": {site(1, "q_proj"): 4},
    },
    "ranks and alphas": {"target_modules": HOLES, "rank_pattern": {"o_proj": 8}, "alpha_pattern": {"up_proj": 3}},
    "alphas": {"target_modules": ALL, "alpha_pattern": {"up_proj": 3}},
    "one pattern for all": {"target_modules": everywhere("q_proj", "v_proj"), "rank_pattern": {".*_proj": 2}},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "rslora, ranks": {"target_modules": HOLES, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "odd alpha": {"target_modules": ALL, "lora_alpha": 7.5},
    "rank 8": {"target_modules": ALL, "r": 8},
    "rank 12": {"target_modules": ALL, "r": 12},
    "rank 20, holes": {"target_modules": HOLES, "r": 20},  # more than the 16 outputs of k_proj and v_proj
    "rank 8, rslora": {"target_modules": ALL, "r": 8, "use_rslora": True},
    "ranks that are padded alike": {
        "target_modules": everywhere("v_proj", "o_proj"),
        "r": 8,
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"v_proj": 4},
    },
    "a rank that no site has": {"target_modules": ALL, "r": 32, "rank_pattern": {".*_proj": 8}},
    "a bias that no layer has": {"target_modules": everywhere("v_proj"), "r": 8, "bias": "lora_only"},
    "head": {"target_modules": [*everywhere("v_proj"), "lm_head"], "r": 8},
    "embeddings": {"target_modules": [*everywhere("v_proj"), "embed_tokens"], "r": 8},
    "a pattern of names": {"target_modules": r".*\.layers\.[02]\.self_attn\.(q|v)_proj"},
}


@dataclass(frozen=True)
class Saved:
    folder: Path
    base: str
    logits: torch.Tensor


def base_model(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def logits(base: str, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base_model(base), adapter)(TOKENS).logits


# -- each runtime, written down anew and slowly: ΔW by site, or that it fails ----------------------------------------


class FailsError(Exception):
    """The runtime refuses or cannot load the adapter."""


KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def pairs(folder):
    """A and B of each site; copies of the base's weights are no part of an adapter."""
    found = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if not key.endswith(".base_layer.weight"):
            name, matrix = KEY.fullmatch(key).groups()
            found.setdefault(name, {})[matrix] = tensor.double()
    return {name: (own["A"], own["B"]) for name, own in sorted(found.items())}


def last(name):
    return name.rpartition(".")[2]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def root(r, config, reads_rslora):
    return math.sqrt(r) if reads_rslora and config["use_rslora"] else r


def by_patterns(folder):
    """PEFT."""
    config = config_of(folder)

    def setting(pattern, default, name):
        found = [v for k, v in config[pattern].items() if re.match(rf"(.*\.)?({k})$", name)]
        return found[0] if found else config[default]

    return {
        name: setting("alpha_pattern", "lora_alpha", name)
        / root(setting("rank_pattern", "r", name), config, reads_rslora=True)
        * (b @ a)
        for name, (a, b) in pairs(folder).items()
    }


def sglang(folder, layers):
    config, own = config_of(folder), pairs(folder)
    if not isinstance(config["target_modules"], list):
        raise FailsError("a list of names is wanted")
    for layer in range(layers):
        here = {name.rpartition(".")[2] for name in own if f".{layer}." in name}
        if here & {"q_proj", "k_proj", "v_proj"} and not {"q_proj", "v_proj"} <= here:
            raise FailsError("KeyError: q_proj, v_proj")
        if "up_proj" in here and "gate_proj" not in here:
            raise FailsError("up_proj is not found in the target modules")
    if any(len(a) != config["r"] for a, _ in own.values()):
        raise FailsError("shapes of the memory pool")
    return {name: config["lora_alpha"] / config["r"] * (b @ a) for name, (a, b) in own.items()}


def vllm(folder, layers):  # noqa: ARG001 - all readers are called alike
    if config_of(folder)["bias"] != "none":
        raise FailsError("Adapter bias is not supported.")
    return by_patterns(folder)


def padded(r):
    return next(size for size in (8, *range(16, 1000, 16)) if size >= r)


def stacking(*projections):
    """TGI and LoRAX: one projection after the other, in all layers or not at all; each overwrites r."""

    def read(folder, layers):
        config, own = config_of(folder), pairs(folder)
        r, found = config["r"], {}
        for projection in projections:
            here = {name: pair for name, pair in own.items() if last(name) == projection}
            if len(here) < (1 if projection == "lm_head" else layers):
                continue
            if len({padded(len(a)) for a, _ in here.values()}) > 1:
                raise FailsError("torch.stack")
            scale = config["lora_alpha"] / root(r, config, reads_rslora=True)
            found |= {name: scale * (b @ a) for name, (a, b) in here.items()}
            r = padded(len(next(iter(here.values()))[0]))
        return found

    return read


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_cpp(folder, layers):  # noqa: ARG001 - all readers are called alike
    config = config_of(folder)
    return {name: config["lora_alpha"] / len(a) * (b @ a) for name, (a, b) in pairs(folder).items()}


def ollama(folder, layers):
    if not isinstance(config_of(folder)["lora_alpha"], int):
        raise FailsError("lora_alpha is parsed as uint32")
    for name, (_, b) in pairs(folder).items():
        if last(name) not in LLAMA:
            raise FailsError("no tensor of this name in the base model")
        if last(name) in ("q_proj", "k_proj"):
            raise FailsError("the rows of the heads are in another order, silently")
        if b.shape[0] < b.shape[1]:
            raise FailsError("B is transposed")
    return llama_cpp(folder, layers)


def mlx(folder, layers):  # noqa: ARG001 - all readers are called alike
    if not (folder / "adapters.safetensors").exists():
        raise FailsError("no adapters.safetensors")
    config, tensors = config_of(folder), load_file(folder / "adapters.safetensors")
    lora = config["lora_parameters"]
    assert {key.rpartition(".")[0] for key in tensors} == set(lora["keys"])
    found = {}
    for name in lora["keys"]:
        a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == lora["rank"]
        found[name] = lora["scale"] * b.T @ a.T
    return found


COMPUTE = {
    "vllm": vllm,
    "sglang": sglang,
    "tgi": stacking(*LLAMA),
    "lorax": stacking(*LLAMA, "lm_head"),
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "mlx": mlx,
}
