"""What each runtime computes with an adapter's files, written down anew and slowly: ΔW by site, or that it fails.

The rules are those of the runtimes' own code, which ``benchmarks/readers`` runs.
"""

import json
import math
import re

from safetensors.torch import load_file


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
