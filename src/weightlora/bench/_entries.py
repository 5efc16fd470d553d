"""The entries of a benchmark's files: checked one by one, merged, and overridden from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from weightlora.errors import OptionError
from weightlora.files import read_mapping
from weightlora.options import MOST, MOST_SEED, Range, check_types
from weightlora.plan.budget import check_keep
from weightlora.runs.recipe import named_options
from weightlora.text import closest

_KEYS = (
    *("output_dir", "base", "tasks", "methods", "budgets", "learning_rates", "seeds", "tuning_seeds"),
    *("rows", "metric", "tuning_metric", "reference", "timing_rounds", "keep_adapters"),
)
_TYPES = {
    **dict.fromkeys(("output_dir", "metric", "tuning_metric", "reference"), "str"),
    "timing_rounds": "int",
    "keep_adapters": "bool",
}
#: Options of a run that entries of their own decide, so that ``base`` and the options of a row would be ignored.
_ENTRY_OF = {
    "output_dir": "output_dir",
    "task": "tasks",
    "method": "methods",
    "keep": "budgets",
    "learning_rate": "learning_rates",
    "seed": "seeds",
}


def read_entries(paths: Sequence[str | Path], words: Sequence[str]) -> dict[str, Any]:
    """Return what the files say, the later one first, under the options of the command line; defaults are filled in.

    Raises:
        DataError: A file is not readable.
        OptionError: An entry is unknown, missing or has a value it cannot have.
    """
    given: dict[str, Any] = {
        "output_dir": f"runs/{'-'.join(Path(one).stem for one in paths)}",
        "tasks": ["rotten_tomatoes"],
        "seeds": [0],
        **_merged([_checked(path) for path in paths]),
    }
    task = given["base"].get("task")
    if task is not None and task not in list(given["tasks"]):
        raise OptionError(f"base: task={task!r:.80} is none of the tasks ({', '.join(given['tasks'])}); add it there")
    given = _overridden(given, words)
    for name in ("methods", "learning_rates"):
        if not given.get(name):
            raise OptionError(f"{name}=None is not allowed: give at least one")
    return given


def names(value: Sequence[str] | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the names of an entry with their options; a list has none.

    Example:
        >>> names(["lora"]), names({"lora": None, "random": {"keep": 5}})
        ({'lora': {}}, {'lora': {}, 'random': {'keep': 5}})
    """
    return {name: dict((value[name] if isinstance(value, Mapping) else None) or {}) for name in value}


def budgets(name: str, value: Any) -> list[Any]:
    """Return the budgets of the entry ``name``, which is one or a list of them.

    Raises:
        OptionError: There is none, one is given twice, or one cannot be kept within.
    """
    given = cast("list[Any]", value if isinstance(value, list) else [value])
    _require(bool(given), name, given, "give at least one")
    try:
        for keep in given:
            check_keep(keep)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error
    _require_once(name, map(str, given))
    return given


def _checked(path: str | Path) -> dict[str, Any]:
    content = read_mapping(path)
    try:
        for key in content:
            if key not in _KEYS:
                raise OptionError(f"unknown entry {key!r:.80}{closest(str(key), _KEYS)}; there are {', '.join(_KEYS)}")
        _check(content)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return content


def _check(content: Mapping[str, Any]) -> None:
    """Raise where an entry has a value that it cannot have, whatever the others say."""
    try:
        json.dumps(content, sort_keys=True, ensure_ascii=False).encode()  # as a record holds it
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set, or a list that holds itself
        raise OptionError(
            f"only numbers, texts, lists and mappings are allowed ({error}); put texts in quotes"
        ) from error
    check_types(_TYPES, content)
    _require(str(content.get("output_dir", "x")).strip() != "", "output_dir", "", "give a folder")
    rounds = content.get("timing_rounds", 0)
    _require(rounds >= 0, "timing_rounds", rounds, "give a whole number of at least 0")
    for name, (allowed, what) in _NUMBERS.items():
        if name in content:
            _check_numbers(name, content[name], allowed, what)
    if "rows" in content:
        _check_list("rows", content["rows"], _is_text, "row's name")
        _require_once("rows", content["rows"])
    if "budgets" in content:
        budgets("budgets", content["budgets"])
    if content.get("base") is not None:
        _check_options("base", content["base"], but=("task",))
    for name, own in {"tasks": (), "methods": ("method", "keep")}.items():
        if name in content:
            _check_names(name, content[name], but=own)


def _check_numbers(name: str, value: Any, allowed: Callable[[Any], bool], what: str) -> None:
    _check_list(name, value, allowed, what)
    _require_once(name, map(float, value))


def _check_list(name: str, value: Any, allowed: Callable[[Any], bool], what: str) -> None:
    fits = isinstance(value, list) and bool(value) and all(map(allowed, cast("list[Any]", value)))
    _require(fits, name, value, f"give a list of at least one {what}")


def _check_names(name: str, value: Any, but: Sequence[str]) -> None:
    known = isinstance(value, (list, dict)) and bool(value) and all(_is_text(one) for one in cast("list[Any]", value))
    _require(known, name, value, "give names, or names with options")
    _require_once(name, value)
    for label, own in cast("dict[str, Any]", value).items() if isinstance(value, dict) else ():
        if own is not None:
            _check_options(f"{name}: {label}", own, but=but)
            if "learning_rates" in own and name == "methods":
                _check_numbers(f"{name}: {label}: learning_rates", own["learning_rates"], *_NUMBERS["learning_rates"])
            if "keep" in own:
                budgets(f"{name}: {label}: keep", own["keep"])


def _check_options(where: str, options: Any, but: Sequence[str]) -> None:
    """Raise unless ``options`` are those of a run, without what another entry decides."""
    _require(
        isinstance(options, dict) and all(map(_is_text, options)), where, options, "give options with their values"
    )
    for option, entry in _ENTRY_OF.items():
        if option in options and option not in but:
            raise OptionError(f"{where}: {option} is decided by {entry}; leave it out here")
    if "method" in options:
        _require(_is_text(options["method"]), f"{where}: method", options["method"], "give the name of a method")


def _merged(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All entries; of those that several have, the last, and ``base`` option by option."""
    merged: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for content in contents:
        merged |= content
        base |= content.get("base") or {}
    return {**merged, "base": base}


def _overridden(given: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The files' content with the options of the command line in the place of its own."""
    base: dict[str, Any] = given["base"]
    if not words:
        return {**given}
    named = named_options({**base, "task": next(iter(given["tasks"]))}, words)
    if "method" in named:
        raise OptionError("--method is not allowed: the file's methods are compared; use weightlora train for one")
    single = {entry: [named.pop(option)] for option, entry in _ENTRY_OF.items() if option in named}
    if "learning_rates" not in single:
        return {**given, **single, "base": {**base, **named}}
    rows = names(given.get("methods", []))
    own = {label: {k: v for k, v in row.items() if k != "learning_rates"} for label, row in rows.items()}
    return {**given, **single, "methods": own, "base": {**base, **named}}


def _require(fits: bool, name: str, value: Any, allowed: str) -> None:
    if not fits:
        raise OptionError(f"{name}={value!r:.80} is not allowed: {allowed}")


def _require_once(name: str, values: Iterable[Any]) -> None:
    found = list(values)
    for value in found:
        _require(found.count(value) == 1, name, found, f"give {value!r:.80} once")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_rate(value: Any) -> bool:
    """Whether it is a learning rate; YAML reads 5e-5 as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return Range(0, MOST).allows(float(value))
    except (ValueError, OverflowError):
        return False


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_SEED


#: What the lists of numbers hold, and how it is called.
_NUMBERS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rates": (_is_rate, "number of at least 0"),
    "seeds": (_is_seed, f"whole number from 0 to {MOST_SEED}"),
    "tuning_seeds": (_is_seed, f"whole number from 0 to {MOST_SEED}"),
}
