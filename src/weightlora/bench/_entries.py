"""The entries of a benchmark's files: checked one by one, merged, and overridden from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from weightlora.errors import OptionError
from weightlora.files import read_mapping
from weightlora.plan.limits import LIMITS, read_limit
from weightlora.runs.recipe import named_options
from weightlora.text import closest
from weightlora.validation import Natural, NotNegative, Seed, Text, checked


def _once(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r:.80} once")
    return values


def _number(value: Any) -> Any:
    """YAML reads 5e-5 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_Rates = Annotated[list[Annotated[NotNegative, BeforeValidator(_number)]], Field(min_length=1), AfterValidator(_once)]
_Tuned = Annotated[dict[Text, Annotated[list[Any], Field(min_length=1), AfterValidator(_once)]], Field(min_length=1)]
_Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_once)]
_Names = Annotated[list[Text], Field(min_length=1), AfterValidator(_once)]
_Options = dict[Text, Any]
_Labelled = Annotated[dict[Text, Any], Field(min_length=1)]
_Limit = Literal["adapters", "parameters", "time", "memory"]
_ListOfLimits = Annotated[list[Annotated[dict[_Limit, Any], Field(min_length=1)]], Field(min_length=1)]
#: What each entry may be; ``limits`` has a further check of its own.
_KINDS: Mapping[str, Any] = {
    "output_dir": Text,
    "base": _Options | None,
    **dict.fromkeys(("tasks", "methods"), _Names | _Labelled),
    "limits": _ListOfLimits,
    "learning_rates": _Rates,
    "tune": _Tuned,
    "seeds": _Seeds,
    "tuning_seeds": _Seeds,
    "rows": _Names,
    **dict.fromkeys(("metric", "tuning_metric", "reference"), str),
    "timing_rounds": Natural,
    "keep_adapters": bool,
}
#: The one option that every row tunes.
RATE = "learning_rate"
#: What options of a method may be, but for those of the method itself.
_OF_METHOD: Mapping[str, Any] = {"method": Text, "learning_rates": _Rates, "tune": _Tuned}
#: Options of a run that entries of their own decide, so that ``base`` and the options of a row would be ignored.
_ENTRY_OF = {
    "output_dir": "output_dir",
    "task": "tasks",
    "method": "methods",
    **dict.fromkeys(LIMITS, "limits"),
    RATE: "learning_rates",
    "seed": "seeds",
}


def read_entries(paths: Sequence[str | Path], words: Sequence[str]) -> dict[str, Any]:
    """Return what the files say, the later one first, under the options of the command line; defaults are filled in.

    Raises:
        DataError: A file is not readable.
        OptionError: An entry is unknown, missing or has a value it cannot have.
    """
    given: dict[str, Any] = {
        "output_dir": f"runs/{'-'.join(_stem(path) for path in paths)}",
        "tasks": ["rotten_tomatoes"],
        "seeds": [0],
        **_merged([_checked(path) for path in paths]),
    }
    task = given["base"].get("task")
    if task is not None and task not in list(given["tasks"]):
        raise OptionError(f"base: task={task!r:.80} is none of the tasks ({', '.join(given['tasks'])}); add it there")
    _require_untuned(given)
    given = _overridden(given, words)
    for name, there in {"methods": given.get("methods"), "learning_rates": RATE in given["tune"]}.items():
        if not there:
            raise OptionError(f"{name}=None is not allowed: give at least one")
    return given


def names(value: Sequence[str] | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the names of an entry with their options; a list has none.

    Example:
        >>> names(["lora"]), names({"lora": None, "random": {"adapters": 5}})
        ({'lora': {}}, {'lora': {}, 'random': {'adapters': 5}})
    """
    return {name: dict((value[name] if isinstance(value, Mapping) else None) or {}) for name in value}


def limits_text(options: Mapping[str, Any]) -> str:
    """Return the limits among the options of a run as labels have them; without any the text is empty.

    Example:
        >>> limits_text({"adapters": "5", "seed": 0}), limits_text({"parameters": 0.1, "time": 0.6})
        ('K = 5', 'parameters 0.1, time 0.6')
    """
    given = {name: read_limit(name, str(options[name])) for name in LIMITS if name in options}
    names = {name: "K =" if name == "adapters" and isinstance(given[name], int) else name for name in given}
    return ", ".join(f"{names[name]} {value}" for name, value in given.items())


def _check_limits(where: str, values: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a limit cannot be kept, or is given twice."""
    try:
        texts = [limits_text(value) for value in values]
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error
    checked(_Once, texts, where)


_Once = Annotated[list[str], AfterValidator(_once)]


def _stem(path: str | Path) -> str:
    """What a file, or its part, is called in the name of the output folder."""
    file, _, part = str(path).rpartition("#")
    return part if file else Path(path).stem


def _checked(path: str | Path) -> dict[str, Any]:
    """The content of a file, each entry as it may be, whatever the others say."""
    content = read_mapping(path)
    try:
        for key in content:
            if key not in _KINDS:
                raise OptionError(
                    f"unknown entry {key!r:.80}{closest(str(key), _KINDS)}; there are {', '.join(_KINDS)}"
                )
        try:
            json.dumps(content, sort_keys=True, ensure_ascii=False).encode()  # as a record holds it
        except (TypeError, ValueError, RecursionError) as error:  # a date, a set, or a list that holds itself
            raise OptionError(
                f"only numbers, texts, lists and mappings are allowed ({error}); put texts in quotes"
            ) from error
        for name, value in content.items():
            labelled = name in ("tasks", "methods") and isinstance(value, dict)
            checked(_Labelled if labelled else _KINDS[name], value, name)
        if "limits" in content:
            _check_limits("limits", content["limits"])
        _check_tuned("", content)
        _check_decided("base", content.get("base") or {}, but=("task",))
        for name, but in {"tasks": (), "methods": ("method", *LIMITS)}.items():
            given = content.get(name, {})
            for label in given if isinstance(given, dict) else ():
                where = f"{name}: {label}"
                own = checked(_Options | None, given[label], where) or {}
                _check_decided(where, own, but)
                for option in own.keys() & _OF_METHOD.keys() if name == "methods" else ():
                    checked(_OF_METHOD[option], own[option], f"{where}: {option}")
                _check_tuned(f"{where}: ", own if name == "methods" else {})
                _check_limits(where, [own])
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return content


def _check_decided(where: str, options: Mapping[str, Any], but: Sequence[str]) -> None:
    """Raise where ``options`` have one that another entry decides."""
    for option, entry in _ENTRY_OF.items():
        if option in options and option not in but:
            raise OptionError(f"{where}: {option} is decided by {entry}; leave it out here")


def _check_tuned(where: str, options: Mapping[str, Any]) -> None:
    """Raise where ``tune`` has what another entry decides, or a rate that is none."""
    tune: Mapping[str, Any] = options.get("tune") or {}
    _check_decided(f"{where}tune", tune, but=(RATE,))
    if RATE in tune:
        checked(_Rates, tune[RATE], f"{where}tune: {RATE}")
    for option in tune:
        if option in options or (option == RATE and "learning_rates" in options):
            raise OptionError(f"{where}tune: {option} is given beside it, too; leave one of them out")


def tuned(options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of each option that is tuned; ``learning_rates`` is short for the rate in ``tune``.

    Example:
        >>> tuned({"learning_rates": ["1e-3"], "tune": {"warmup_steps": [0, 20]}})
        {'warmup_steps': [0, 20], 'learning_rate': [0.001]}
    """
    found = {**(options.get("tune") or {})}
    if "learning_rates" in options:
        found[RATE] = options["learning_rates"]
    return {name: [float(value) for value in values] if name == RATE else values for name, values in found.items()}


def _merged(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All entries; of those that several have, the last, and ``base`` and ``tune`` option by option."""
    merged: dict[str, Any] = {}
    base: dict[str, Any] = {}
    tune: dict[str, Any] = {}
    for content in contents:
        merged |= content
        base |= content.get("base") or {}
        tune |= tuned(content)
    return {**merged, "base": base, "tune": tune}


def _require_untuned(given: Mapping[str, Any]) -> None:
    """Raise where ``base`` or a task has an option that is tuned."""
    parts = {"base": given["base"], **{f"tasks: {label}": own for label, own in names(given["tasks"]).items()}}
    for where, options in parts.items():
        for option in given["tune"].keys() & options.keys():
            raise OptionError(f"{where}: {option} is decided by tune; leave it out here")


def _overridden(given: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The files' content with the options of the command line in the place of its own."""
    base: dict[str, Any] = given["base"]
    if not words:
        return {**given}
    named = named_options({**base, "task": next(iter(given["tasks"]))}, words)
    if "method" in named:
        raise OptionError("--method is not allowed: the file's methods are compared; use weightlora train for one")
    rows = names(given.get("methods", []))
    own = {label: {**row, "tune": _without(tuned(row), named)} for label, row in rows.items()}
    for row in own.values():
        row.pop("learning_rates", None)
    tune = _without(given["tune"], named)
    if RATE in named:
        tune[RATE] = [named.pop(RATE)]
    limits = {name: named.pop(name) for name in LIMITS if name in named}
    single = {entry: [named.pop(option)] for option, entry in _ENTRY_OF.items() if option in named}
    single |= {"limits": [limits]} if limits else {}
    return {**given, **single, "methods": own, "tune": tune, "base": {**base, **named}}


def _without(tune: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What is left to tune: an option of the command line is not."""
    return {option: values for option, values in tune.items() if option not in named}
