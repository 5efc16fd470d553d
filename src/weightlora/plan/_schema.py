"""The plan's file: JSON of a known schema, validated when read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from weightlora.errors import PlanError
from weightlora.files import write_json

SCHEMA = 1
#: Fields of a planned site, in addition to its name and shape.
ENTRY_KEYS = ("lora_r", "lora_alpha", "r", "alpha", "score", "score_error")
#: Fields of the plan, in addition to its sites and history.
PLAN_KEYS = ("rule", "options", "seed", "base_model", "versions", "lora")


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
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is not a plan: not JSON, or cut off ({error})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    schema = cast("dict[str, Any]", data).get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise PlanError(f"{path} is not a plan of schema {SCHEMA}: found schema {schema!r}; select anew")
    fault = _fault(data)
    if fault:
        raise PlanError(f"{path} is not a valid plan: {fault}; select anew")
    return data


def _fault(data: Mapping[str, Any]) -> str | None:
    """The first fault of the content, or None."""
    missing = [key for key in (*PLAN_KEYS, "fingerprint", "sites", "history") if key not in data]
    if missing:
        return f"it lacks {', '.join(missing)}"
    kinds = {"rule": str, "options": dict, "seed": int, "versions": dict, "lora": dict, "sites": list, "history": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(data[key], kind)]
    if wrong:
        return f"{wrong[0]} is {data[wrong[0]]!r:.40}"
    faults = filter(None, map(_site_fault, data["sites"]))
    return next(faults, None) or _whole_fault(data)


def _site_fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a site is {row!r:.40}"
    site = cast("dict[str, Any]", row)
    if not isinstance(site.get("name"), str):
        return f"a site has the name {site.get('name')!r:.40}"
    for key, least in (("in_features", 1), ("out_features", 1), ("lora_r", 1), ("r", 0)):
        if type(site.get(key)) is not int or site[key] < least:
            return f"{site['name']} has {key}={site.get(key)!r}; give a whole number from {least}"
    for key in ("lora_alpha", "alpha", "score"):
        if type(site.get(key)) not in (int, float) or not math.isfinite(site[key]):
            return f"{site['name']} has {key}={site.get(key)!r}; give a finite number"
        if key != "score" and site[key] <= 0:
            return f"{site['name']} has {key}={site[key]!r}; give a positive number"
    error = site.get("score_error")  # plans of before have none
    if error is not None and (type(error) not in (int, float) or not 0 <= error < math.inf):
        return f"{site['name']} has score_error={error!r}; give null or a number from 0"
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
        if any(type(value) not in (int, float) for value in cast("list[Any]", row)):
            return "its history holds something that is not a number"
    return None
