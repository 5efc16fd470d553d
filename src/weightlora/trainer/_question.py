"""What a trainer's plan is made for: a stored plan is used again only where nothing of it has changed.

The question is a small JSON record in ``plan.json``: the LoRA configuration, the candidate sites, the base weights, the
first batch, and every option that decides scores or limits.

Left out is what may differ between two starts of one run. Modules that are trained whole have no part in the base
weights: a new head is random, and a script may build it without a seed. The number of processes may change as long as
an optimizer step has as many rows. The number of training steps counts only where a named rule's T depends on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Trainer

from weightlora.cost.empty_model import quantisation_tensors
from weightlora.methods.families.selecting import SelectingMethod
from weightlora.methods.weightlora_plus import WeightLoraPlus
from weightlora.model.distributed import whole_tensor
from weightlora.model.gathering import loaded
from weightlora.model.sites import all_modules, find_sites, trained_modules
from weightlora.model.torch_private import is_persistent
from weightlora.plan.attach import asked_fields
from weightlora.plan.limits import LIMITS, UNIFORM
from weightlora.plan.plan import sites_fingerprint
from weightlora.selection.rules import settings_of
from weightlora.selection.rules.base import Rule
from weightlora.selection.scoring import Scoring
from weightlora.selection.steps import reading_times, scoring_steps
from weightlora.trainer.loader import planned_steps

#: Training arguments that change the loss or its gradients, of transformers and of TRL's trainers.
_ARGUMENTS = (
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha"),
    *("loss_type", "beta", "label_smoothing", "max_length", "packing"),
)
#: Those that decide the steps of an optimizer.
_OF_OPTIMIZER = (
    *("learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
)
#: Numbers of a tensor that are read: evenly spread, so that a model of any size takes milliseconds.
_NUMBERS = 64
#: The longest words for a difference; a longer value is not shown.
_MOST = 160


def question_of(
    trainer: Trainer, name: str, lora: LoraConfig, method: SelectingMethod, *, first: Any, own_loss: bool
) -> dict[str, Any]:
    """Return what the plan of this trainer is made for; all processes call it together.

    Args:
        trainer: A fresh trainer.
        name: Of the method.
        lora: The adapters wanted.
        method: It selects by options of its own and of the trainer.
        first: The first micro-batch of the training; None where none is read.
        own_loss: The loss is not the trainer's.
    """
    model: Any = trainer.model
    steps = planned_steps(trainer)
    options = {"method": name, **_options(method.scoring, steps), **_training(trainer), "own_loss": own_loss}
    if isinstance(method, WeightLoraPlus):
        options["budget"] = method.budget
    if method.scoring.run is not None:
        arguments = trainer.args.to_dict()
        options |= {"training_steps": steps, **{key: arguments[key] for key in _OF_OPTIMIZER}}
    asked = {
        "lora": asked_fields(lora),
        "options": options,
        "candidates": sites_fingerprint(find_sites(model, lora).sites),
        "base_weights": weights_fingerprint(model, lora),
        "first_batch": None if first is None else batch_fingerprint(first),
    }
    return json.loads(json.dumps(asked, default=str))


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between two questions; what follows from another difference is left out."""
    lora, options = (
        [_words(key, there[part].get(key, default.get(key)), now[part].get(key, default.get(key))) for key in keys]
        for part, default, keys in (
            ("lora", LoraConfig().to_dict(), _changed(there["lora"], now["lora"])),
            ("options", {}, _changed(there["options"], now["options"])),
        )
    )
    order = {"seed", "rows_per_step"} & set(_changed(there["options"], now["options"]))
    besides = [("base_weights", "other base weights", False)]
    besides += [("candidates", "other candidate sites", bool(lora))]
    besides += [("first_batch", "other training data (its first batch differs)", bool(order))]
    return options + lora + [text for key, text, follows in besides if there[key] != now[key] and not follows]


def weights_fingerprint(model: nn.Module, lora: LoraConfig) -> str:
    """Return a SHA-256 of the base model's names, shapes, types and some numbers of each tensor.

    Quantised weights are read as they are stored. Offloaded and partitioned ones are loaded module by module; where a
    tensor has no numbers that can be read, its name, shape and type count.

    Args:
        model: The base model, or a PEFT model around it.
        lora: Says which modules are trained whole, and left out.
    """
    digest = hashlib.sha256()
    whole = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in trained_modules(lora)]
    for name, module in all_modules(model).items():
        if any(pattern.match(name) for pattern in whole):
            continue
        with loaded(module):
            for key, tensor in _own_tensors(module):
                digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(_numbers(tensor))
    return digest.hexdigest()


def batch_fingerprint(batch: Any) -> str:
    """Return a SHA-256 of the content of a batch.

    Example:
        >>> one, other = {"a": torch.ones(2), "b": "x"}, {"b": "x", "a": torch.zeros(2)}
        >>> batch_fingerprint(one) == batch_fingerprint(other)
        False
    """
    digest = hashlib.sha256()
    for path, value in _leaves("", batch):
        digest.update(f"{path} ".encode())
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype} ".encode() + _bytes(value))
        elif isinstance(value, str | int | float | bool | None):
            digest.update(repr(value).encode())
        else:  # its text may hold an address
            digest.update(type(value).__name__.encode())
    return digest.hexdigest()


def _options(scoring: Scoring, total_steps: int) -> dict[str, Any]:
    """The options that decide scores and limits, with the values that they come to."""
    scoring = replace(scoring, total_steps=total_steps)
    rule = scoring.scored_by
    scored: dict[str, Any] = {}
    if rule is not None:
        scored = {
            "ranking": scoring.ranked_by,
            **settings_of(rule),
            **_steps(scoring, rule, total_steps),
            "learning_rate": float(scoring.learning_rate),
            "head_learning_rate": float(scoring.head_learning_rate or scoring.learning_rate),
        }
    return {
        **dict.fromkeys(LIMITS),
        **scoring.limits.asked,
        "epochs": None if scoring.time is None else scoring.epochs,
        "rule": UNIFORM if rule is None else rule.name,
        **scored,
        "seed": scoring.seed,
        "fast": scoring.fast,
        "warm_start": scoring.warm_start,
    }


def _steps(scoring: Scoring, rule: Rule, total_steps: int) -> dict[str, Any]:
    """T; where the default decides it, a longer or shorter training is no other question."""
    if scoring.steps is None and scoring.rule is None:
        return {"steps": None}
    if scoring.steps == "auto":
        return {"steps": "auto", "most_steps": reading_times("auto", rule, total_steps)[-1]}
    return {"steps": scoring_steps(total_steps, rule.least_steps) if scoring.steps is None else scoring.steps}


def _training(trainer: Trainer) -> dict[str, Any]:
    """What the training itself adds: its precision and loss, the rows of a step, and how many rows there are."""
    arguments: dict[str, Any] = trainer.args.to_dict()
    rows: Any = trainer.train_dataset
    step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    return {
        **{key: arguments[key] for key in _ARGUMENTS if key in arguments},
        "rows_per_step": step,
        "train_rows": len(rows) if isinstance(rows, Sized) else None,
    }


def _changed(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys with other values; those of another rule's settings say nothing new."""
    keys = [key for key in {**there, **now} if (key in there and key in now) or there.get("rule") == now.get("rule")]
    # As text: 1 is one adapter, and 1.0 all of them.
    return [key for key in keys if json.dumps(there.get(key)) != json.dumps(now.get(key))]


def _words(key: str, there: Any, now: Any) -> str:
    text = f"{key}={there!r} there, {now!r} now"
    return text if len(text) <= _MOST else f"another {key}"


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the module itself, its buffers, and what belongs to quantised ones."""
    for key, parameter in module.named_parameters(recurse=False):
        yield key, parameter
        yield from ((f"{key}.{i}", part) for i, part in enumerate(quantisation_tensors(parameter)))
    yield from ((key, b) for key, b in module.named_buffers(recurse=False) if is_persistent(module, key))


@torch.no_grad()
def _numbers(tensor: Tensor) -> bytes:
    """Some numbers of a tensor, evenly spread; none where they cannot be read."""
    if tensor.is_meta:
        return b""
    try:
        flat = whole_tensor(tensor.detach()).as_subclass(Tensor).reshape(-1)
        return _bytes(flat[:: max(1, -(-len(flat) // _NUMBERS))])
    except (NotImplementedError, RuntimeError, TypeError):  # a packed type that has no such operation
        return b""


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Everything in a nested batch with its place, in an order that the insertion of keys does not change."""
    if isinstance(value, Mapping):
        named = cast("Mapping[Any, Any]", value)
        for key in sorted(named, key=str):
            yield from _leaves(f"{path}.{key}", named[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, one in enumerate(cast("Sequence[Any]", value)):
            yield from _leaves(f"{path}.{i}", one)
    else:
        yield path, value
