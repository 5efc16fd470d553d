"""What each runtime computes with an adapter's files, written down anew and slowly: ΔW by site, or that it fails.

The rules are those of the runtimes' own code (vLLM 0.33, SGLang 0.5.23, TGI's adapters/lora.py, llama.cpp's converter
and its scale alpha / rank).
"""

import json
import math
import re

from safetensors.torch import load_file


class FailsError(Exception):
    """The runtime refuses or cannot load the adapter."""


def pairs(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors})
    return {n: tuple(tensors[f"base_model.model.{n}.lora_{m}.weight"].double() for m in "AB") for n in names}


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def root(r, config, reads_rslora):
    return math.sqrt(r) if reads_rslora and config["use_rslora"] else r


def by_patterns(folder):
    """PEFT and vLLM."""
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


def tgi(folder, layers):
    config, own = config_of(folder), pairs(folder)
    kinds = {re.sub(r"\.\d+\.", ".{}.", name) for name in own}
    whole = {kind for kind in kinds if all(kind.format(layer) in own for layer in range(layers))}
    used = {name: pair for name, pair in own.items() if re.sub(r"\.\d+\.", ".{}.", name) in whole}
    for kind in whole:
        if len({len(own[kind.format(layer)][0]) for layer in range(layers)}) > 1:
            raise FailsError("torch.stack")
    scale = config["lora_alpha"] / root(config["r"], config, reads_rslora=True)
    return {name: scale * (b @ a) for name, (a, b) in used.items()}


def llama_cpp(folder, layers):  # noqa: ARG001 - all readers are called alike
    config = config_of(folder)
    return {name: config["lora_alpha"] / len(a) * (b @ a) for name, (a, b) in pairs(folder).items()}


def ollama(folder, layers):
    if not isinstance(config_of(folder)["lora_alpha"], int):
        raise FailsError("lora_alpha is parsed as uint32")
    if any(b.shape[0] < b.shape[1] for _, b in pairs(folder).values()):
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
    "vllm": lambda folder, layers: by_patterns(folder),  # noqa: ARG005 - all readers are called alike
    "sglang": sglang,
    "tgi": tgi,
    "lorax": tgi,
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "mlx": mlx,
}
