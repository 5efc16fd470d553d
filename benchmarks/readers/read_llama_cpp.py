"""llama.cpp: its convert_lora_to_gguf.py, and inference on the CPU with the adapter that it makes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import PROMPT, expected
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

TITLE = "llama.cpp (converter of llama-cpp-python 0.3.36, inference of xllamacpp 2026.10.11549)"
KIND = "converter and inference ran whole, on the CPU"
#: Of the log-probabilities; the base model alone differs by 0.001, since llama.cpp keeps the cache in half precision.
LIMIT = 0.05
_scripts: list[Path] = []
#: The greedy answer as JSON, in a process of its own: it aborts where an adapter does not fit.
_COMPLETE = """
import json, sys
import xllamacpp

model, adapter, prompt, count, words = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path = model
parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 1, 0
parameters.warmup = parameters.fit_params = False
parameters.cpuparams.n_threads = 1
if adapter != "-":
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    parameters.lora_adapters = [lora]
asked = {"n_predict": int(count), "temperature": 0, "logprobs": int(words), "cache_prompt": False}
answer = xllamacpp.Server(parameters).handle_completions({"prompt": json.loads(prompt), **asked})
print(json.dumps(json.loads(answer) if isinstance(answer, str) else answer))
"""


def prepare(converter: Path) -> None:
    """Remember where convert_lora_to_gguf.py is.

    Raises:
        ImportError: xllamacpp or gguf is not installed.
    """
    if not converter.is_file():
        raise ImportError(f"{converter} is missing")
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]  # it needs the gguf of its own version
    import gguf  # noqa: F401
    import xllamacpp  # noqa: F401

    _scripts[:] = [converter]


def error(folder: Path, original: Path, base: Path, option: str | None) -> float:  # noqa: ARG001 - all readers are called alike
    """Return the largest difference of a log-probability to PEFT's."""
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter.gguf"
        convert(folder, base, adapter)
        return float((log_probabilities(gguf_base(base), adapter) - expected(original, base)).abs().max())


def convert(folder: Path, base: Path, target: Path) -> None:
    """Run the converter in this process, where its imports are there already."""
    arguments, said = sys.argv, io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    sys.argv = ["convert", str(folder), "--base", str(base), "--outfile", str(target), "--outtype", "f32"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(_scripts[0]), run_name="__main__")
    except SystemExit as error:
        raise RuntimeError(said.getvalue().strip().splitlines()[-1]) from error
    finally:
        sys.argv = arguments
        logging.getLogger().removeHandler(handler)


@cache
def gguf_base(base: Path) -> Path:
    """The base model as a GGUF file in float32, with a vocabulary of made-up words."""
    import gguf

    config = AutoConfig.from_pretrained(base)
    path = Path(tempfile.mkdtemp()) / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(config.vocab_size - 3))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in LlamaForCausalLM.from_pretrained(base).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        for projection, count in heads.items():
            weight = reordered(weight, count) if projection in name else weight
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reordered(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj and k_proj in llama.cpp's order of rotary halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def log_probabilities(model: Path, adapter: Path | None, prompt: list[int] | None = None) -> Tensor:
    """Of all words after the prompt, by llama.cpp."""
    answer = complete(model, adapter, prompt or PROMPT, 1, words=64)
    found = torch.zeros(64)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def complete(model: Path, adapter: Path | None, prompt: list[int], count: int, words: int = 1) -> dict[str, Any]:
    """Llama.cpp's greedy answer, with the log-probabilities of the first ``words`` words at each place.

    Raises:
        RuntimeError: Model or adapter cannot be loaded, or llama.cpp aborts.
    """
    asked = [str(model), str(adapter or "-"), json.dumps(prompt), str(count), str(words)]
    command = [sys.executable, "-c", _COMPLETE, *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ASSERT" in line or "Error" in line or " E " in line]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
