"""TGI and LoRAX: LoraConfig, load_module_map and prepare_weights of the code that serves, with its own pad_rank."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from stand_ins import stand_in_for
from torch import Tensor
from transformers import AutoConfig

TITLE = "TGI 3.3 (a7394ba)"
KIND = "its loading of adapters ran, with pad_rank of its Gaudi backend; its kernels did not"
_SERVER, _GAUDI = "server/text_generation_server", "backends/gaudi/server/text_generation_server"
_FILES = ("adapters/__init__.py", "adapters/config.py", "adapters/lora.py", "adapters/weights.py", "utils/adapter.py")
#: In the order of get_model_with_lora_adapters.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "c_proj", "c_fc")


def show(repository: Path, path: str) -> str:
    """The text of a file of a bare repository."""
    command = ["git", f"--git-dir={repository}", "show", f"HEAD:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def prepare(repository: Path) -> None:
    """Take the reader's files of TGI's repository, and make them importable."""
    root = Path(tempfile.mkdtemp())
    package = root / "text_generation_server"
    for name, path in {**{f: f"{_SERVER}/{f}" for f in _FILES}, "utils/sgmv.py": f"{_GAUDI}/utils/sgmv.py"}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(show(repository, path))
    for outside in ("loguru", "punica_kernels"):
        stand_in_for(outside, root, lambda _: False)
    sgmv: dict[str, Any] = {}
    stand_in_for(
        "text_generation_server",
        root,
        lambda name: (package.parent / (name.replace(".", "/") + ".py")).is_file() or name.endswith(".adapters"),
        {
            "text_generation_server.utils.import_utils": {"SYSTEM": "cuda"},
            "text_generation_server.utils.kernels": {"load_kernel": lambda **_: SimpleNamespace(**sgmv)},
            "text_generation_server.utils.log": {"log_master": lambda *_: None},
            "text_generation_server.utils": {"hub": SimpleNamespace(_weight_files_from_dir=_weight_files)},
        },
    )
    kernel = importlib.import_module("text_generation_server.utils.sgmv")
    sgmv.update({name: getattr(kernel, name) for name in ("pad_rank", "orient_for_rank", "use_cutlass_shrink")})


def _weight_files(folder: str, extension: str) -> list[Path]:
    """Stands for TGI's hub module, which needs its own settings."""
    return sorted(Path(folder).glob(f"*{extension}"))


def small_model(config: Any) -> Any:
    """What TGI's and LoRAX's Llama have where adapters are looked for."""
    linear = SimpleNamespace(base_layer=SimpleNamespace(linear=SimpleNamespace(weight=torch.zeros(1))))
    block = SimpleNamespace(
        self_attn=SimpleNamespace(query_key_value=linear, o_proj=linear),
        mlp=SimpleNamespace(gate_up_proj=linear, down_proj=linear),
    )
    model = SimpleNamespace(layers=[block] * config.num_hidden_layers)
    return SimpleNamespace(model=model, lm_head=linear)


def updates(weights: Any, names: list[str]) -> dict[str, Tensor]:
    """ΔW from the stacked matrices of one projection."""
    a, b = (
        weights.weights_a.double(),
        weights.weights_b.double(),
    )  # [layers, in, r] or [layers, r, in]; [layers, r, out]
    r = b.shape[1]
    a = a if a.shape[2] == r and r < 16 else a.transpose(1, 2) if 16 <= r <= 128 else a
    return {name: (a[i] @ b[i]).T for i, name in enumerate(names)}


def read(folder: Path, base: Path, option: str | None) -> dict[str, Tensor]:  # noqa: ARG001 - all readers are called alike
    """Return ΔW of each weight, as get_model_with_lora_adapters loads it on one GPU."""
    from text_generation_server.adapters.lora import LoraWeights
    from text_generation_server.utils.adapter import build_layer_weight_lookup, load_module_map

    model = small_model(AutoConfig.from_pretrained(base))
    targets = build_layer_weight_lookup(model)
    weight_names = tuple(value[0] for value in targets.values())
    load_module_map.cache_clear()
    module_map, config, names, _ = load_module_map(str(base), None, str(folder), str(folder), weight_names)
    unused, layers = names.copy(), len(model.model.layers)
    found: dict[str, Tensor] = {}
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    for kind in LAYERS:
        weights = LoraWeights.prepare_weights(
            config, module_map, kind, unused, layers, torch.float32, 1, group, targets
        )
        if weights is not None:
            found |= updates(weights, [targets[i, kind][0] for i in range(layers)])
    return found
