"""What tests of a selection share: rules by name, and what must be left as it was."""

import random
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from weightlora.selection.rules import rule_of, settings_of

# -- rules by name and settings, as the argument of ``select`` -------------------------------------------------------

SETTINGS = ("head_steps", "threshold_every", "gate_lr", "order")


def ruled(rule="first_order", **options):
    """``options`` with the settings that the rule has in a rule object: ``ruled(head_steps=0, steps=4)``."""
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    known = settings_of(rule_of(rule))
    return {**options, "rule": rule_of(rule, **{k: v for k, v in settings.items() if k in known})}


# -- the rules of benchmarks/choice by their import paths, as a user names a rule of their own -----------------------

_HERE = "benchmarks.choice.rules"
BY_GRADIENT = {
    "fisher": f"{_HERE}.adapter_gradients:Fisher",
    "relative_gradient": f"{_HERE}.full_weights:RelativeGradient",
    "aletheia": f"{_HERE}.full_weights:Aletheia",
    "gora": f"{_HERE}.full_weights:GoRA",
    "cross_fitted": f"{_HERE}.adapter_gradients:CrossFitted",
}
BY_INPUTS = {
    "plop": f"{_HERE}.layer_inputs:PLoP",
    "explained_variance": f"{_HERE}.layer_inputs:ExplainedVariance",
}
OF_THUMB = {
    "last_layers": f"{_HERE}.heuristic:LastLayers",
    "first_layers": f"{_HERE}.heuristic:FirstLayers",
    "strided": f"{_HERE}.heuristic:Strided",
    "mlp": f"{_HERE}.heuristic:Mlp",
    "attention": f"{_HERE}.heuristic:Attention",
    "v_o_down": f"{_HERE}.heuristic:VOutDown",
}
STUDY = {**BY_GRADIENT, **BY_INPUTS, **OF_THUMB}


# -- everything about a model and the random states, in one comparable value -----------------------------------------


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
