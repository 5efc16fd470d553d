"""Ollama's own conversion of a PEFT folder, written down anew from its Go code, and llama.cpp's inference with it.

The rules are those of convert/convert_llama_adapter.go and convert/convert.go: names are replaced, a matrix that looks
transposed is transposed, ``lora_alpha`` is a whole number, A of q_proj and k_proj is reordered by heads, and B is not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from adapters import expected
from read_llama_cpp import LIMIT, gguf_base, log_probabilities, reordered
from read_llama_cpp import prepare as prepare_llama_cpp
from safetensors.torch import load_file
from transformers import AutoConfig

TITLE = "Ollama's own conversion (fb30760)"
KIND = "read: its conversion is written down anew from its Go code; llama.cpp's inference ran"
_NAMES = {
    "base_model.model.": "",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "lora_A.weight": "weight.lora_a",
    "lora_B.weight": "weight.lora_b",
}


def prepare(converter: Path) -> None:
    """Make llama.cpp's inference and gguf importable.

    Raises:
        ImportError: xllamacpp or gguf is not installed.
    """
    prepare_llama_cpp(converter)


def error(folder: Path, original: Path, base: Path, option: str | None) -> float:  # noqa: ARG001 - all readers are called alike
    """Return the largest difference of a log-probability to PEFT's."""
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter.gguf"
        convert(folder, base, adapter)
        return float((log_probabilities(gguf_base(base), adapter) - expected(original, base)).abs().max())


def convert(folder: Path, base: Path, target: Path) -> None:
    """Write what Ollama would."""
    import gguf

    config = json.loads((folder / "adapter_config.json").read_text())
    if not isinstance(config["lora_alpha"], int):
        raise ValueError("json: cannot unmarshal number into Go struct field AdapterParameters.lora_alpha of uint32")
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
    heads = AutoConfig.from_pretrained(base).num_attention_heads
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        matrix, rows, columns = tensor.float().numpy(), *tensor.shape
        if name.endswith(("attn_q.weight.lora_a", "attn_k.weight.lora_a")):
            # repack: the data of [r, in] is taken as [in, r], and its rows are reordered
            matrix = reordered(matrix.reshape(columns, rows), heads).reshape(rows, columns)
        if (name.endswith("lora_a") and rows > columns) or (name.endswith("lora_b") and rows < columns):
            matrix = np.ascontiguousarray(matrix.T)
        writer.add_tensor(name, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


__all__ = ["KIND", "LIMIT", "TITLE", "error", "prepare"]
