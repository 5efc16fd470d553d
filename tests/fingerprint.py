"""Everything about a model and the random states that a selection must leave as it was, in one comparable value."""

import random
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Objects are compared by identity, tensors by identity, type and bytes."""
    modules = list(model.named_modules())
    configs = [c for _, m in modules if isinstance(c := vars(m).get("config"), PretrainedConfig)]
    adapters = [vars(m).get("peft_config") or {} for _, m in modules]
    return {
        "tree": modules,
        # Hooks, train/eval mode, sizes, flags: all but the tensors, which have no plain equality.
        "attributes": [{k: _copy(v) for k, v in vars(m).items() if k not in _TENSORS} for _, m in modules],
        "configs": [deepcopy(vars(config)) for config in configs],
        "adapters": [{name: config.to_dict() for name, config in found.items()} for found in adapters],
        "parameters": [(n, _bits(p), p.requires_grad, _bits(p.grad)) for n, p in model.named_parameters()],
        "buffers": [(n, _bits(b)) for n, b in model.named_buffers()],
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
    }


_TENSORS = ("_parameters", "_buffers")


def _copy(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value.copy() if isinstance(value, (list, set)) else value


def _bits(tensor: Tensor | None) -> tuple[int, torch.dtype, object] | None:
    if tensor is None:
        return None
    if tensor.is_meta:
        return id(tensor), tensor.dtype, tensor.shape
    return id(tensor), tensor.dtype, hash(tensor.detach().cpu().numpy().tobytes())
