"""MLX LM 0.32: its Llama and its load_adapters, on MLX's CPU backend."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from adapters import PROMPT, expected

TITLE = "MLX LM 0.32.2"
KIND = "ran whole, on MLX's CPU backend"
#: Of the log-probabilities.
LIMIT = 0.001


def prepare() -> None:
    """Import it.

    Raises:
        ImportError: mlx or mlx-lm is not installed.
    """
    import mlx_lm.models.llama
    import mlx_lm.tuner.utils  # noqa: F401


def error(folder: Path, original: Path, base: Path, option: str | None) -> float:  # noqa: ARG001 - all readers are called alike
    """Return the largest difference of a log-probability to PEFT's."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    model = Model(ModelArgs.from_dict(json.loads((base / "config.json").read_text())))
    model.load_weights(list(model.sanitize(mx.load(str(base / "model.safetensors"))).items()))
    load_adapters(model, str(folder))
    model.eval()
    logits = torch.from_numpy(np.array(model(mx.array([PROMPT]))[0, -1].astype(mx.float32)))
    return float((logits.log_softmax(-1) - expected(original, base)).abs().max())
