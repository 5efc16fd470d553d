"""The plan's file: JSON of a known schema, validated when read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WrapValidator, with_config
from typing_extensions import NotRequired, TypedDict

from weightlora.errors import PlanError
from weightlora.files import write_json
from weightlora.validation import MOST, Fault, first_fault

SCHEMA = 1
#: Fields of a planned site, in addition to its name and shape.
ENTRY_KEYS = ("lora_r", "lora_alpha", "r", "alpha", "score", "score_error")
#: Fields of the plan, in addition to its sites and history.
PLAN_KEYS = ("rule", "options", "seed", "base_model", "versions", "lora")

_DEEPEST = 20
_MOST = 1e300  # the difference of two is still finite
#: Far above any layer, and within the whole numbers that torch has.
MOST_RANK = 2**20
#: Above any alpha that is used; a scale beyond it overflows in half precision.
MOST_ALPHA = 1e9


# -- what each field may hold ------------------------------------------------------------------------------------------


def _say(allowed: str) -> WrapValidator:
    """Say of any fault of a value that it is not what is ``allowed``."""

    def check(value: Any, check_kind: Callable[[Any], Any]) -> Any:
        try:
            return check_kind(value)
        except ValidationError:
            raise ValueError(allowed) from None

    return WrapValidator(check)


def _check_name(name: str) -> str:
    if not name.isprintable() or not name.strip("."):
        raise ValueError("a name of printable characters")
    return name


def _check_pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError("a regular expression") from error
    return text


Rank = Annotated[int, Field(ge=1, le=MOST_RANK), _say(f"a whole number from 1 to {MOST_RANK}")]
Alpha = Annotated[float, Field(gt=0, le=MOST_ALPHA), _say(f"a positive number up to {MOST_ALPHA:g}")]
_Size = Annotated[int, Field(ge=1, le=MOST), _say(f"a whole number from 1 to {MOST}")]
_Finite = Annotated[float, Field(ge=-_MOST, le=_MOST), _say("a finite number")]
_Positive = Annotated[float, Field(gt=0, le=_MOST), _say("a positive number")]
_Name = Annotated[str, AfterValidator(_check_name)]


class _StoredSite(TypedDict):
    name: _Name
    in_features: _Size
    out_features: _Size
    lora_r: Rank
    r: Annotated[int, Field(ge=0, le=MOST_RANK), _say(f"a whole number from 0 to {MOST_RANK}")]
    lora_alpha: Alpha
    alpha: Alpha
    score: _Finite
    score_error: NotRequired[Annotated[float | None, Field(ge=0, le=_MOST), _say("null or a number from 0")]]


@with_config(ConfigDict(extra="forbid"))
class _Parameter(TypedDict):
    name: _Name
    shape: Annotated[list[_Size], Field(min_length=2, max_length=3), _say("two or three whole numbers from 1")]
    r: Rank
    alpha: Alpha


class _Options(TypedDict, total=False):
    """They are a record; these are read again."""

    kind: str
    expand: str
    warm_start: bool
    learning_rate: _Positive
    epochs: _Positive
    step_time: _Positive
    step_share: Annotated[float, Field(gt=0, le=1), _say("a number in (0, 1]")]
    run_time: _Positive
    floor_times: list[_Positive]
    floor_gains: list[_Finite]
    peak_bytes: _Positive
    lora_peak_bytes: _Positive
    lora_rows: _Size
    lora_rows_peak_bytes: _Positive
    batch_parts: _Size


class _Plan(TypedDict):
    rule: str
    options: _Options
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch takes
    base_model: str | None
    versions: Annotated[dict[str, str], _say("a text for each library")]
    lora: dict[str, Any]
    fingerprint: str
    sites: list[_StoredSite]
    history: list[list[_Finite]]
    target_parameters: NotRequired[list[_Parameter]]
    question: NotRequired[dict[str, Any]]
    spent: NotRequired[dict[str, Annotated[int, Field(ge=0, le=MOST)]]]


_TASKS = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
_STARTS = "gaussian|eva|olora|pissa|pissa_niter_[0-9]{1,4}|corda|loftq|lora_ga|orthogonal|mica"
_Text = Annotated[str, Field(min_length=1)]
_Index = Annotated[int, Field(ge=0, le=MOST)]
_MaybeText = _Text | None
_Layers = _Index | list[_Index] | None
_Pair = Annotated[list[_Index], Field(min_length=2, max_length=2)]
_NAMES = ("a list of names or null", list[_Text] | None)
_Pattern = list[_Text] | Annotated[_Text, AfterValidator(_check_pattern)] | None
_PATTERN = ("a list of names, a regular expression or null", _Pattern)
#: Of a ``LoraConfig``: what is allowed, in words and as a type. PEFT checks few of its fields, and late.
_LORA: Mapping[str, tuple[str, Any]] = {
    "task_type": (f"null or one of {', '.join(_TASKS.__args__)}", _TASKS | None),
    "bias": ("none, all or lora_only", Literal["none", "all", "lora_only"]),
    "lora_dropout": ("a probability from 0 to 1", Annotated[float, Field(ge=0, le=1)]),
    "init_lora_weights": (
        "true, false or the name of one of PEFT's initialisations",
        bool | Annotated[str, Field(pattern=f"^(?:{_STARTS})$")],
    ),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "exclude_modules": _PATTERN,
    "layers_pattern": _PATTERN,
    "layers_to_transform": ("a layer's number, a list of them or null", _Layers),
    "layer_replication": ("a list of pairs of layers or null", list[_Pair] | None),
    "alora_invocation_tokens": ("a list of tokens or null", list[_Index] | None),
    "trainable_token_indices": ("tokens, or a list for each name", list[_Index] | dict[str, list[_Index]] | None),
    "qalora_group_size": ("a whole number from 1", _Size),
    "megatron_core": ("a module's name or null", _MaybeText),
    "runtime_config": ("null; PEFT does not save it", None),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"),
        ("true or false", bool),
    ),
    **dict.fromkeys(
        (
            *("megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
            *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
        ),
        ("a mapping or null", dict[str, Any] | None),
    ),
}

# -- the file ----------------------------------------------------------------------------------------------------------


def write_plan_file(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` under the current schema; a failed write leaves no file.

    Raises:
        OutputError: The folder cannot be written.
    """
    write_json(path, {"schema": SCHEMA, **data})


def read_plan_file(path: str | Path) -> dict[str, Any]:
    """Return the content of a plan's file, with each field present and of its type.

    Raises:
        PlanError: The file is missing, truncated, not JSON, of an unknown schema, or inconsistent.
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    except ValueError as error:  # not JSON, or a number of more digits than Python reads
        raise PlanError(f"{path} is not a plan: not JSON, or cut off ({error})") from error
    schema = cast("dict[str, Any]", data).get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise PlanError(f"{path} is not a plan of schema {SCHEMA}: found schema {schema!r:.40}; select anew")
    fault = text_fault(data) or _fault(data)
    if fault:
        raise PlanError(f"{path} is not a valid plan: {fault}; select anew")
    return data


def text_fault(data: Any) -> str | None:
    """What ``data`` holds that JSON can name, but that cannot be written or shown, or None.

    That is half of a character, or values that are nested deeper than Python follows.
    """
    level, depth = [data], 0
    while level := [inner for value in level for inner in _inside(value)]:
        depth += 1
        if depth > _DEEPEST:
            return f"its values are nested more than {_DEEPEST} deep"
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"it holds {error.object[error.start]!r}, which is no character"
    return None


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).values()
    return cast("list[Any]", value) if isinstance(value, list) else ()


def _fault(data: Mapping[str, Any]) -> str | None:
    """The first fault of the content, or None."""
    fault = first_fault(_Plan, data)
    return _line(data, fault) if fault else _whole_fault(data) or _lora_fault(data["lora"])


def _line(data: Mapping[str, Any], fault: Fault) -> str:
    """A fault in words: the site or parameter, the field, what it holds and what is allowed."""
    first, *inner = fault.path
    owner, field = "", str(first)
    if first in ("sites", "target_parameters") and inner:
        row: Any = data[str(first)][inner[0]]
        named = isinstance(row, dict) and not first_fault(_Name, cast("dict[str, Any]", row).get("name"))
        owner = row["name"] if named else "a site" if first == "sites" else "a target parameter"
        field = str(inner[1]) if inner[1:] else ""
    elif inner:
        field = f"option {inner[0]}" if first == "options" else f"{first}[{inner[0]!r}]"
    if fault.missing:
        return f"{owner or 'it'} lacks {field}"
    what = f"{owner} has {field}=" if owner and field else f"{owner or field} is "
    return f"{what}{fault.value!r:.40}; give {fault.allowed}"


def _whole_fault(data: Mapping[str, Any]) -> str | None:
    """A fault that no field has alone."""
    names = [row["name"] for row in data["sites"]]
    twice = sorted({name for name, after in zip(sorted(names), sorted(names)[1:], strict=False) if name == after})
    if twice:
        return f"it names sites twice: {', '.join(twice[:5])}"
    if names != sorted(names):
        return "its sites are not sorted by name"
    if not any(row["r"] for row in data["sites"]):
        return "it keeps no site"
    planned = {"target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern"} & set(data["lora"])
    if planned:
        return f"lora holds {', '.join(sorted(planned))}, which belong to its sites"
    if any(len(row) != len(names) for row in data["history"]):
        return f"each row of its history needs {len(names)} numbers, one per site"
    parameters = [row["name"] for row in data.get("target_parameters", ())]
    if parameters != sorted(set(parameters)):
        return "its target parameters are not sorted, or one is named twice"
    return None


def _lora_fault(lora: Mapping[str, Any]) -> str | None:
    """The first field of ``lora`` with a value that it cannot have, or None; fields of other PEFT versions pass."""
    for name, value in lora.items():
        allowed, kind = _LORA.get(name, ("", Any))
        if first_fault(kind, value):
            return f"lora has {name}={value!r:.60}; give {allowed}"
    return None
