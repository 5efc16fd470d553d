"""The plan's file: JSON of a known schema, validated when read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from weightlora.errors import PlanError
from weightlora.files import write_json
from weightlora.plan._lora_schema import MOST_ALPHA, is_number, is_whole, lora_fault

SCHEMA = 1
#: Fields of a planned site, in addition to its name and shape.
ENTRY_KEYS = ("lora_r", "lora_alpha", "r", "alpha", "score", "score_error")
#: Fields of the plan, in addition to its sites and history.
PLAN_KEYS = ("rule", "options", "seed", "base_model", "versions", "lora")

_DEEPEST = 20
_MOST = 1e300  # the difference of two is still finite
#: Far above any layer, and within the whole numbers that torch has.
MOST_RANK = 2**20
_WHOLE = {"in_features": (1, 2**31 - 1), "out_features": (1, 2**31 - 1), "lora_r": (1, MOST_RANK), "r": (0, MOST_RANK)}
_SEEDS = (-(2**63), 2**64 - 1)  # what torch takes


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
    missing = [key for key in (*PLAN_KEYS, "fingerprint", "sites", "history") if key not in data]
    if missing:
        return f"it lacks {', '.join(missing)}"
    kinds = {"rule": str, "options": dict, "versions": dict, "lora": dict, "sites": list, "history": list}
    kinds |= {"fingerprint": str, "base_model": str | None}
    wrong = [key for key, kind in kinds.items() if not isinstance(data[key], kind)]
    wrong += [] if is_whole(data["seed"], *_SEEDS) else ["seed"]
    wrong += [] if isinstance(data.get("question", {}), dict) else ["question"]
    if wrong:
        return f"{wrong[0]} is {data[wrong[0]]!r:.40}"
    if not all(isinstance(value, str) for value in data["versions"].values()):
        return f"versions is {data['versions']!r:.40}; give a text for each library"
    faults = filter(None, map(_site_fault, data["sites"]))
    fault = next(faults, None) or _whole_fault(data) or lora_fault(data["lora"]) or _options_fault(data["options"])
    return fault or _parameters_fault(data.get("target_parameters", []))


def _site_fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a site is {row!r:.40}"
    site = cast("dict[str, Any]", row)
    name = site.get("name")
    if not isinstance(name, str) or not name or not name.isprintable():
        return f"a site has the name {name!r:.40}"
    for key, (least, most) in _WHOLE.items():
        if not is_whole(site.get(key), least, most):
            return f"{name} has {key}={site.get(key)!r:.40}; give a whole number from {least} to {most}"
    for key in ("lora_alpha", "alpha"):
        if not is_number(site.get(key), 0, MOST_ALPHA) or site[key] == 0:
            return f"{name} has {key}={site.get(key)!r:.40}; give a positive number up to {MOST_ALPHA:g}"
    if not is_number(site.get("score"), -_MOST, _MOST):
        return f"{name} has score={site.get('score')!r:.40}; give a finite number"
    error = site.get("score_error")  # plans of before have none
    if error is not None and not is_number(error, 0, _MOST):
        return f"{name} has score_error={error!r:.40}; give null or a number from 0"
    return None


def _whole_fault(data: Mapping[str, Any]) -> str | None:
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
    for row in data["history"]:
        if not isinstance(row, list) or len(cast("list[Any]", row)) != len(names):
            return f"each row of its history needs {len(names)} numbers, one per site"
        if not all(is_number(value, -_MOST, _MOST) for value in cast("list[Any]", row)):
            return "its history holds something that is not a finite number"
    return None


def _parameters_fault(rows: Any) -> str | None:
    """The first fault of the adapters of single parameters; plans without one leave them out."""
    if not isinstance(rows, list):
        return f"target_parameters is {rows!r:.40}"
    for row in cast("list[Any]", rows):
        if not isinstance(row, dict) or row.keys() != {"name", "shape", "r", "alpha"}:
            return f"a target parameter is {row!r:.40}"
        parameter = cast("dict[str, Any]", row)
        name, shape = parameter["name"], parameter["shape"]
        if not isinstance(name, str) or not name.isprintable() or not name.strip("."):
            return f"a target parameter has the name {name!r:.40}"
        sizes = cast("list[Any]", shape) if isinstance(shape, list) else []
        if len(sizes) not in (2, 3) or not all(is_whole(size, 1, 2**31 - 1) for size in sizes):
            return f"{name} has shape={shape!r:.40}; give two or three whole numbers from 1"
        if not is_whole(parameter["r"], 1, MOST_RANK) or not is_number(parameter["alpha"], 1e-300, MOST_ALPHA):
            return f"{name} has r={parameter['r']!r:.40} and alpha={parameter['alpha']!r:.40}; give positive numbers"
    names = [row["name"] for row in cast("list[Any]", rows)]
    return None if names == sorted(set(names)) else "its target parameters are not sorted, or one is named twice"


def _options_fault(options: Mapping[str, Any]) -> str | None:
    """Options are a record; these are read again."""
    kinds = {"kind": str, "expand": str, "warm_start": bool}
    wrong = [name for name, kind in kinds.items() if not isinstance(options.get(name, kind()), kind)]
    return f"option {wrong[0]} is {options[wrong[0]]!r:.40}" if wrong else None
