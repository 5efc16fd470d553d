"""The range of every number of a recipe, ours and the training's, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from weightlora.errors import OptionError
from weightlora.options import MOST, MOST_SEED, Range

_FROM_1, _FROM_0 = Range(1, MOST), Range(0, MOST)
_SHARE, _SEED = Range(0, 1, open_most=True), Range(0, MOST_SEED)
#: By the name of an option; None is allowed where it is the default. Other options have no range.
_RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "max_seq_length", "max_target_length"), _FROM_1),
    **dict.fromkeys(("num_beams", "lora_alpha"), _FROM_1),
    "lora_r": Range(1, 65_536),  # more than any layer is wide
    **dict.fromkeys(("held_out_samples", "doc_stride"), _FROM_0),
    "lora_dropout": _SHARE,
    # transformers' own classes check few of theirs
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _FROM_1),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), _FROM_1),
    **dict.fromkeys(("max_length", "generation_max_length", "generation_num_beams"), _FROM_1),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor"), _FROM_1),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay"), _FROM_0),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), _FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
    "warmup_ratio": Range(0, 1),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), Range(0, open_least=True)),
    "num_train_epochs": Range(0, open_least=True),
    **dict.fromkeys(("learning_rate", "head_learning_rate"), _FROM_0),
    "max_steps": Range(1, MOST, but=-1),
    "seed": _SEED,
    "data_seed": _SEED,
}


def check_ranges(options: Any) -> None:
    """Raise where a field of a dataclass of options is out of its range.

    Raises:
        OptionError: With the value and what is allowed.
    """
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), _RANGES.get(field.name)
        if field.name.endswith("_kwargs") and isinstance(value, str):
            raise OptionError(f'{field.name}={value!r:.80} is not allowed: give an object, such as {{"name": 1}}')
        if field.name == "optim_args" and value and not all("=" in part for part in value.split(",")):
            raise OptionError(f"optim_args={value!r:.80} is not allowed: give name=value, ...")
        if value is None or isinstance(value, str):  # left out; or a word that transformers gives a meaning
            continue
        if isinstance(value, (int, float)) and not abs(value) <= MOST_SEED:
            raise OptionError(f"{field.name}={value!r:.80} is not allowed: give a number of at most {MOST_SEED}")
        if allowed is not None and not allowed.allows(value):
            raise OptionError(f"{field.name}={value} is not allowed: give {allowed}")
