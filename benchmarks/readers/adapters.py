"""The adapters that the readers get: every shape that plans have, and what each of our methods ends in."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "serving"), str(ROOT / "tests" / "methods")]

from small_adapters import ALL, LAYERS, SHAPES, everywhere  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
#: Fields of LoraConfig, in addition to the shapes that the tests use.
MORE: dict[str, dict[str, Any]] = {
    "rank 8": {"target_modules": ALL, "r": 8},
    "rank 12": {"target_modules": ALL, "r": 12},
    "rank 16, holes": {"target_modules": everywhere("q_proj", "v_proj")[1:], "r": 16},
    "rank 20": {"target_modules": ALL, "r": 20},  # k_proj and v_proj have 16 outputs
    "rank 32, all patterns 8": {"target_modules": ALL, "r": 32, "rank_pattern": {".*_proj": 8}},
    "k only": {"target_modules": everywhere("k_proj"), "r": 8},
    "no attention": {"target_modules": everywhere("gate_proj", "up_proj", "down_proj"), "r": 8},
    "v and o, rank 8": {"target_modules": everywhere("v_proj", "o_proj"), "r": 8, "lora_alpha": 16},
    "rslora, rank 8": {"target_modules": ALL, "r": 8, "use_rslora": True},
    "lm_head": {"target_modules": [*everywhere("q_proj", "v_proj"), "lm_head"], "r": 8},
    "embed_tokens": {"target_modules": [*everywhere("q_proj", "v_proj"), "embed_tokens"], "r": 8},
    "bias of lora_only": {"target_modules": ALL, "r": 8, "bias": "lora_only"},
    "lora_bias": {"target_modules": everywhere("q_proj", "v_proj"), "r": 8, "lora_bias": True},
    "DoRA": {"target_modules": everywhere("q_proj", "v_proj"), "r": 8, "use_dora": True},
    "whole lm_head": {"target_modules": everywhere("q_proj", "v_proj"), "r": 8, "modules_to_save": ["lm_head"]},
}


@dataclass(frozen=True)
class Saved:
    """An adapter on disk."""

    name: str
    folder: Path
    base: Path


def make_base(folder: Path, *, tied: bool = False) -> Path:
    """A small Llama with grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=LAYERS,
        vocab_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_adapters(folder: Path) -> Iterator[Saved]:
    """Save the adapters one after the other."""
    base, tied = make_base(folder / "base"), make_base(folder / "tied", tied=True)
    for name, fields in {**SHAPES, **MORE}.items():
        yield _random(name, folder, base, fields)
    yield _random("lm_head, tied", folder, tied, MORE["lm_head"])
    yield _random("embed_tokens, tied", folder, tied, MORE["embed_tokens"])
    yield _random("rank 8, bfloat16", folder, base, MORE["rank 8"], torch.bfloat16)
    yield from _methods(folder, base)


def _random(name: str, folder: Path, base: Path, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Saved:
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, **fields})
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "lora_B" in parameter_name and parameter.dim() == 2:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    target = folder / "adapters" / name
    model.to(dtype).save_pretrained(str(target))
    return Saved(name, target, base)


def _methods(folder: Path, base: Path) -> Iterator[Saved]:
    """What each method of the registry ends in after four steps, made as the conformance tests make it."""
    from conformance import NAMES, Architecture, run  # type: ignore[import-not-found]

    small = Architecture(
        lambda: LlamaForCausalLM.from_pretrained(base), {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    )
    for name in NAMES:
        with contextlib.redirect_stdout(io.StringIO()):
            run(name, small, folder / "runs" / name)
        target = folder / "runs" / name / "adapter"
        config = target / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
        yield Saved(f"method {name}", target, base)


def peft_model(saved_folder: Path, base: Path) -> PeftModel:
    """The adapter in PEFT."""
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), saved_folder)


@torch.no_grad()
def peft_updates(folder: Path, base: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight and bias."""
    found: dict[str, Tensor] = {}
    model = peft_model(folder, base).get_base_model()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            start = module.get_base_layer().weight.detach().double()
            if module.use_dora["default"]:
                module.merge()
                found[name] = module.get_base_layer().weight.double() - start
                module.unmerge()
                continue
            found[name] = module.get_delta_weight("default").double()
            bias = module.lora_bias.get("default") and module.lora_B["default"].bias
            if bias is not None and bias is not False:
                found[f"{name}.bias"] = module.scaling["default"] * bias.double()
        elif isinstance(module, ModulesToSaveWrapper):
            found[name] = (module.modules_to_save["default"].weight - module.original_module.weight).double()
    return found


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The norm of what is missing or wrong, as a share of what PEFT adds."""
    zero = torch.zeros(())
    names = found.keys() | wanted.keys()
    wrong = sum(float((found.get(n, zero) - wanted.get(n, zero)).square().sum()) for n in names)
    return (wrong / sum(float(update.square().sum()) for update in wanted.values())) ** 0.5


#: What the runtimes that run whole continue.
PROMPT = [5, 9, 17, 33, 2, 40, 12, 7]


@cache
@torch.no_grad()
def expected(folder: Path, base: Path) -> Tensor:
    """PEFT's log-probabilities of all words after the prompt."""
    return peft_model(folder, base)(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(-1)
