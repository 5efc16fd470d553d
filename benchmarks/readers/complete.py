"""llama.cpp's greedy answer as JSON, in a process of its own: it aborts where an adapter does not fit.

python benchmarks/readers/complete.py MODEL ADAPTER|- TOKENS COUNT WORDS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Load model and adapter, and print the answer to the prompt."""
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
    answer: Any = xllamacpp.Server(parameters).handle_completions({"prompt": json.loads(prompt), **asked})
    print(json.dumps(json.loads(answer) if isinstance(answer, str) else answer))


if __name__ == "__main__":
    main()
