"""LoRAX: LoraConfig, load_module_map and LoraWeights.load of the code that serves, with its own pad_rank."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from read_tgi import LAYERS as TGI_LAYERS
from read_tgi import show, small_model, updates
from safetensors.torch import load_file
from stand_ins import stand_in_for
from torch import Tensor
from transformers import AutoConfig

TITLE = "LoRAX (db931fc)"
KIND = "its loading of adapters ran, with its pad_rank; its kernels did not"
_FILES = ("adapters/config.py", "adapters/lora.py", "adapters/types.py", "utils/punica.py", "utils/lora.py")
#: Of models/flash_llama.py.
LAYERS = (*TGI_LAYERS[:7], "lm_head")


def prepare(repository: Path) -> None:
    """Take the reader's files of LoRAX's repository, and make them importable."""
    root = Path(tempfile.mkdtemp())
    for name in _FILES:
        target = root / "lorax_server" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(show(repository, f"server/lorax_server/{name}"))
    for outside in ("loguru", "punica_kernels"):
        stand_in_for(outside, root, lambda _: False)
    stand_in_for(
        "lorax_server",
        root,
        lambda name: (root / (name.replace(".", "/") + ".py")).is_file(),
        {
            "lorax_server.utils.weights": {
                "load_module_weight": lambda _, module, device, dtype: module.to(device, dtype)
            }
        },
    )


def read(folder: Path, base: Path, option: str | None) -> dict[str, Tensor]:  # noqa: ARG001 - all readers are called alike
    """Return ΔW of each weight, as Model.load_adapter loads it on one GPU."""
    from lorax_server.adapters.lora import LoraConfig

    small = small_model(AutoConfig.from_pretrained(base))
    layers = len(small.model.layers)
    linear = small.lm_head
    parts = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LAYERS[:7]}
    targets: dict[tuple[int, str], tuple[str, Any]] = {
        (i, name): (f"model.layers.{i}.{part}.{name}", linear) for i in range(layers) for name, part in parts.items()
    }
    targets[0, "lm_head"] = ("lm_head", linear)
    model = SimpleNamespace(
        target_to_layer=targets,
        get_num_layers_for_type=lambda kind: 1 if kind == "lm_head" else layers,
        dtype=torch.float32,
        world_size=1,
        shard_lora_weights=lambda a, b, _: (a, b),
    )
    config = LoraConfig.load(str(folder), "")
    names = tuple(value[0] for value in targets.values())
    module_map, adapter_names = config.map_weights_for_model(load_file(folder / "adapter_model.safetensors"), names)
    unused: set[str] = set(adapter_names)
    found: dict[str, Tensor] = {}
    for kind in LAYERS:
        weights = config.load_batched_adapter_weights(model, module_map, kind, unused, True)
        if weights is not None:
            count = model.get_num_layers_for_type(kind)
            found |= updates(weights, [targets[i, kind][0] for i in range(count)])
    return found
