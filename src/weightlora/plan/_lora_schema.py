"""What the fields of a ``LoraConfig`` may hold in a plan's file. PEFT checks few of them, and late."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

#: Above any alpha that is used; a scale beyond it overflows in half precision.
MOST_ALPHA = 1e9

Check = Callable[[Any], bool]


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether ``value`` is a number from ``least`` to ``most``; a boolean and NaN are none."""
    return type(value) in (int, float) and least <= value <= most


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether ``value`` is a whole number from ``least`` to ``most``, written without a point."""
    return type(value) is int and least <= value <= most


def lora_fault(lora: Mapping[str, Any]) -> str | None:
    """The first field of ``lora`` with a value that it cannot have, or None; fields of other PEFT versions pass."""
    for name, value in lora.items():
        allowed, check = _FIELDS.get(name, ("", _anything))
        if not check(value):
            return f"lora has {name}={value!r:.60}; give {allowed}"
    return None


def _anything(_value: Any) -> bool:
    return True


def _flag(value: Any) -> bool:
    return type(value) is bool


def _one_of(*words: str) -> Check:
    return lambda value: isinstance(value, str) and value in words


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _index(value: Any) -> bool:
    return is_whole(value, 0, 2**31 - 1)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, cast("list[Any]", value)))


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _nothing(value: Any) -> bool:
    return value is None


def _pattern(value: Any) -> bool:
    if not _text(value):
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _pair(value: Any) -> bool:
    return _list_of(_index)(value) and len(value) == 2


def _token_lists(value: Any) -> bool:
    return _config(value) and all(map(_list_of(_index), value.values()))


def _config(value: Any) -> bool:
    return isinstance(value, dict)


def _start(value: Any) -> bool:
    return _flag(value) or (isinstance(value, str) and bool(re.fullmatch(_STARTS, value)))


_STARTS = "gaussian|eva|olora|pissa|pissa_niter_[0-9]{1,4}|corda|loftq|lora_ga|orthogonal|mica"
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_NAMES = ("a list of names or null", _either(_nothing, _list_of(_text)))
_PATTERN = ("a list of names, a regular expression or null", _either(_nothing, _list_of(_text), _pattern))
_FLAG = ("true or false", _flag)
_CONFIG = ("a mapping or null", _either(_nothing, _config))
#: What is allowed, in words and as a check.
_FIELDS: Mapping[str, tuple[str, Check]] = {
    "task_type": (f"null or one of {', '.join(_TASKS)}", _either(_nothing, _one_of(*_TASKS))),
    "bias": ("none, all or lora_only", _one_of("none", "all", "lora_only")),
    "lora_dropout": ("a probability from 0 to 1", lambda value: is_number(value, 0, 1)),
    "init_lora_weights": ("true, false or the name of one of PEFT's initialisations", _start),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "exclude_modules": _PATTERN,
    "layers_pattern": _PATTERN,
    "layers_to_transform": ("a layer's number, a list of them or null", _either(_nothing, _index, _list_of(_index))),
    "layer_replication": ("a list of pairs of layers or null", _either(_nothing, _list_of(_pair))),
    "alora_invocation_tokens": ("a list of tokens or null", _either(_nothing, _list_of(_index))),
    "trainable_token_indices": ("tokens, or a list for each name", _either(_nothing, _list_of(_index), _token_lists)),
    "qalora_group_size": ("a whole number from 1", lambda value: is_whole(value, 1, 2**31 - 1)),
    "megatron_core": ("a module's name or null", _either(_nothing, _text)),
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias"), _FLAG),
    "ensure_weight_tying": _FLAG,
    "runtime_config": ("null; PEFT does not save it", _nothing),
    **dict.fromkeys(("megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"), _CONFIG),
    **dict.fromkeys(("velora_config", "monteclora_config", "use_bdlora"), _CONFIG),
    **dict.fromkeys(("arrow_config", "kasa_config"), _CONFIG),
}
