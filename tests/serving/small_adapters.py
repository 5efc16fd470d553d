"""A small Llama with grouped-query attention, and adapters of it in every shape that plans have."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
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
