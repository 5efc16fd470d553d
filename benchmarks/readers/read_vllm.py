"""vLLM 0.33.0: its PEFTHelper, LoRAModel, the packing of its LoRAModelManager and the set_lora of its layers."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from stand_ins import stand_in_for
from torch import Tensor
from transformers import AutoConfig

TITLE = "vLLM 0.33.0"
KIND = "its adapter reading, packing and slots ran; its kernels did not"


def prepare(wheel: Path) -> None:
    """Unpack the reader's files of vLLM's wheel, and make them importable."""
    root = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root, [name for name in archive.namelist() if name.startswith("vllm/lora/")])
    stand_in_for(
        "vllm",
        root,
        lambda name: name.startswith("vllm.lora") and "ops" not in name and "punica" not in name,
        {
            "vllm.utils.torch_utils": {"PIN_MEMORY": False},
            "vllm.envs": {"VLLM_LORA_ENABLE_DUAL_STREAM": False},
            "vllm": {"envs": SimpleNamespace(VLLM_LORA_ENABLE_DUAL_STREAM=False), "__path__": []},
            "vllm.utils.cache": {"LRUCache": dict},
            "vllm.model_executor.layers.linear": {
                name: type(name, (torch.nn.Module,), {})
                for name in ("LinearBase", "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear",
                             "ReplicatedLinear", "RowParallelLinear")
            },
        },
    )  # fmt: skip


def read(folder: Path, base: Path, option: str | None) -> dict[str, Tensor]:
    """Return ΔW of each weight, from what vLLM copies into its slots."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper

    config = AutoConfig.from_pretrained(base)
    limit = int(option.rpartition(" ")[2]) if option else 16
    helper = PEFTHelper.from_local_dir(str(folder), 64)
    helper.validate_legal(SimpleNamespace(max_lora_rank=limit))
    # What get_supported_lora_modules finds in vLLM's Llama, with the names that its packed layers stand for.
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    expected = {"o_proj", "down_proj", "embed_tokens", "lm_head", *packed["qkv_proj"], *packed["gate_up_proj"]}
    model = LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, device="cpu", dtype=torch.float32, model_vocab_size=config.vocab_size
    )
    blocks = [(f"model.layers.{i}.self_attn", "qkv_proj") for i in range(config.num_hidden_layers)]
    blocks += [(f"model.layers.{i}.mlp", "gate_up_proj") for i in range(config.num_hidden_layers)]
    manager: Any = LoRAModelManager.__new__(LoRAModelManager)
    manager.packed_modules = {f"{block}.{name}": [f"{block}.{part}" for part in packed[name]] for block, name in blocks}
    manager.is_pooling_model, manager.modules = False, {}
    manager.is_mm_model = manager.supports_mm = False
    manager._get_text_lora_names = lambda _: []
    manager._create_merged_loras_inplace(model)
    found: dict[str, Tensor] = {}
    for name, lora in model.loras.items():
        parts = manager.packed_modules.get(name, [name])
        matrices = [(lora.lora_a, lora.lora_b)] if len(parts) == 1 else list(zip(lora.lora_a, lora.lora_b, strict=True))
        layer = SimpleNamespace(n_slices=len(parts), tp_size=1, reset_lora=lambda _: None)
        layer.lora_a_stacked = [torch.zeros(1, 1, limit, 64) for _ in parts]
        layer.lora_b_stacked = [torch.zeros(1, 1, 64, limit) for _ in parts]
        if len(parts) == 1:
            BaseLinearLayerWithLoRA.set_lora(layer, 0, lora.lora_a, lora.lora_b)
        else:
            MergedColumnParallelLinearWithLoRA.set_lora(layer, 0, lora.lora_a, lora.lora_b)
        for part, (a, b), a_slot, b_slot in zip(
            parts, matrices, layer.lora_a_stacked, layer.lora_b_stacked, strict=True
        ):
            if a is not None:
                update = b_slot[0, 0, : b.shape[0]].double() @ a_slot[0, 0, :, : a.shape[1]].double()
                found[part] = update.T if part.endswith("embed_tokens") else update
    return found
