"""SGLang 0.5.23: its LoRAConfig, LoRAManager's checks, LoRAAdapter's normalisation and LoRAMemoryPool's buffers."""

from __future__ import annotations

import re
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from stand_ins import StandIn, stand_in_for
from torch import Tensor, nn
from transformers import AutoConfig

TITLE = "SGLang 0.5.23"
KIND = "its checks, its normalisation and its memory pool ran; its kernels did not"
_FOLDERS = ("sglang/srt/lora/", "sglang/srt/layers/utils/")
_REAL = ("lora", "lora_config", "utils", "mem_pool", "lora_manager", "eviction_policy", "layers")


def prepare(wheel: Path) -> None:
    """Unpack the reader's files of SGLang's wheel, and make them importable."""
    root = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root, [name for name in archive.namelist() if name.startswith(_FOLDERS)])
    parallel = SimpleNamespace(
        tp_size=1, tp_rank=0, attn_tp_size=1, moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1, moe_tp_rank=0,
        pp_group=SimpleNamespace(is_last_rank=True),
    )  # fmt: skip
    real = {f"sglang.srt.lora.{name}" for name in _REAL} | {"sglang.srt.layers.utils", "sglang.srt.layers.utils.common"}
    stand_in_for(
        "sglang",
        root,
        real.__contains__,
        {
            "sglang.srt.runtime_context": {"get_parallel": lambda: parallel},
            "sglang.srt.utils": {"is_pin_memory_available": lambda: False},
            "sglang.srt.layers.vocab_parallel_embedding": {
                "ParallelLMHead": type("ParallelLMHead", (nn.Module,), {}),
                "VocabParallelEmbedding": type("VocabParallelEmbedding", (nn.Module,), {}),
            },
            "sglang.srt.layers.moe.fused_moe_triton.layer": {"FusedMoE": type("FusedMoE", (nn.Module,), {})},
        },
    )


class _Layer:
    """A wrapped layer on one GPU, where slices are the whole."""

    def slice_lora_a_weights(self, a: Tensor) -> Tensor:
        return a

    def slice_lora_b_weights(self, b: Tensor) -> Tensor:
        return b


class _Model(nn.Module):
    """Stands for SGLang's Llama; only its configuration and device are looked at."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(1))


def read(folder: Path, base: Path, option: str | None) -> dict[str, Tensor]:  # noqa: ARG001 - all readers are called alike
    """Return ΔW of each weight, from the buffers of SGLang's memory pool."""
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    base_config = AutoConfig.from_pretrained(base)
    config, reference = LoRAConfig(str(folder)), SimpleNamespace(lora_name="a", lora_path=str(folder), pinned=False)
    manager: Any = LoRAManager.__new__(LoRAManager)
    manager.attn_dp_enabled, manager.lora_refs, manager.configs = False, {}, {"a": config}
    manager.base_model, manager.lora_added_tokens_size = _Model(base_config), None
    manager.validate_new_adapter(config, reference)
    manager.lora_refs = {"a": reference}
    manager.init_lora_shapes()
    adapter = LoRAAdapter("a", config, base_config, StandIn(), StandIn())
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    targets = manager.target_modules
    pool: Any = LoRAMemoryPool(
        base_config, 1, torch.float32, manager.max_lora_rank, targets, manager.base_model, "lru", 0
    )
    manager.memory_pool, manager.lora_refs = pool, {}
    manager.validate_new_adapter(config, reference)
    names = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
    layers = [
        {f"model.layers.{i}.{part}.{name}": _Layer() for name, part in names.items() if name in targets}
        for i in range(base_config.num_hidden_layers)
    ]
    pool.load_lora_weight_to_buffer("a", 0, adapter, layers, _Layer(), _Layer())
    return dict(_updates(pool, adapter, base_config))


def _updates(pool: Any, adapter: Any, config: Any) -> Any:
    """B·A of each part of each buffer; a part has ``r`` rows of A, as SGLang's kernels take them."""
    head = config.hidden_size // config.num_attention_heads
    q, kv, mlp = head * config.num_attention_heads, head * config.num_key_value_heads, config.intermediate_size
    parts = {
        "qkv_proj": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "gate_up_proj": {"mlp.gate_proj": mlp, "mlp.up_proj": mlp},
        "o_proj": {"self_attn.o_proj": config.hidden_size},
        "down_proj": {"mlp.down_proj": config.hidden_size},
    }
    r, scale = adapter.config.r, adapter.scaling
    for module, buffers in pool.A_buffer.items():
        for layer, a in enumerate(buffers):
            b, row = pool.B_buffer[module][layer][0], 0
            for i, (name, size) in enumerate(parts[module].items()):
                update = b[row : row + size, :r].double() @ a[0, i * r : (i + 1) * r].double()
                row += size
                if update.any():
                    yield f"model.layers.{layer}.{name}", scale * update
    for name, a, b in (
        ("lm_head", pool.lm_head_A_buffer, pool.lm_head_B_buffer),
        ("model.embed_tokens", pool.embedding_A_buffer, pool.embedding_B_buffer),
    ):
        for key in a:
            if re.search(key, name):
                update = scale * b[key][0, :, :r].double() @ a[key][0, :r].double()
                yield name, update.T if key == "embed_tokens" else update
