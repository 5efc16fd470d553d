"""Values of users, checked by pydantic: the first that is wrong becomes one line with its name and what is allowed.

Kinds are annotations as pydantic reads them: ``int | None``, ``Literal["scale", "keep"]``, ``Count``, ``list[Seed]``, a
``TypedDict``. A validator of one's own raises a ``ValueError`` that says what is allowed, such as ``"a power of two"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from inspect import get_annotations
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Annotated, Any, cast, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from weightlora.errors import OptionError, WeightLoraError

#: The largest whole number of an option, and the largest seed that Python, NumPy and torch all take.
MOST = 2**31 - 1
MOST_SEED = 2**32 - 1

Whole = Annotated[int, Field(ge=-MOST, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
"""A whole number from 0."""
Count = Annotated[int, Field(ge=1, le=MOST)]
"""A whole number from 1."""
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Number = Annotated[float, Field(gt=-1e18, lt=1e18, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, lt=1e18, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""A number from 0, below 1."""
Text = Annotated[str, Field(pattern=r"\S")]
"""A text that is not empty."""

#: What plain annotations of options stand for: numbers that torch can take.
_PLAIN: Mapping[Any, Any] = {int: Whole, float: Number}
#: What is allowed, by the type of pydantic's error; the rest is said in pydantic's words.
_ALLOWED: Mapping[str, str] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a finite number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
    **dict.fromkeys(("string_pattern_mismatch", "string_too_short"), "a text that is not empty"),
    **dict.fromkeys(("list_type", "sequence_str", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "dataclass_type"), "a mapping"),
    "too_short": "at least {min_length} of them",
    "literal_error": "{expected}",
    "greater_than_equal": "a number of at least {ge:.10g}",
    "greater_than": "a number of more than {gt:.10g}",
    "less_than_equal": "a number of at most {le:.10g}",
    "less_than": "a number of less than {lt:.10g}",
    "value_error": "{error}",
}


@dataclass(frozen=True)
class Fault:
    """The first value that is not allowed."""

    path: tuple[str | int, ...]
    """Where it is in what was checked; of an entry that is missing or unknown, the entry."""
    value: Any
    allowed: str
    """What is allowed there, such as ``a number of at least 1``; empty where there may be nothing."""
    missing: bool = False


def first_fault(kind: Any, value: Any, *, strict: bool = True) -> Fault | None:
    """Return the first fault of a value; None where it has none.

    Args:
        kind: An annotation that pydantic knows.
        value: What a user gave.
        strict: False also takes texts as they are written on a command line: ``"8"`` is a whole number.

    Example:
        >>> first_fault(dict[str, Count], {"r": 8})
        >>> first_fault(dict[str, Count], {"r": 0})
        Fault(path=('r',), value=0, allowed='a number of at least 1', missing=False)
    """
    try:
        TypeAdapter(kind).validate_python(_plain(value), strict=strict)
    except ValidationError as error:
        return _fault(error, value)
    return None


def checked(
    kind: Any, value: Any, name: str, *, strict: bool = True, error: type[WeightLoraError] = OptionError
) -> Any:
    """Return a value as pydantic makes it of what a user gave, of the kind that is asked for.

    Args:
        kind: An annotation that pydantic knows.
        value: What a user gave; NumPy's numbers are numbers, and true and false are none.
        name: Of the option, for the error.
        strict: False also takes texts as they are written on a command line: ``"8"`` is a whole number.
        error: What is raised.

    Raises:
        WeightLoraError: With the value found, what is allowed and the option.

    Example:
        >>> checked(Count, 8, "r"), checked(int, "8", "r", strict=False)
        (8, 8)
        >>> checked(Count, 0, "r")
        Traceback (most recent call last):
        ...
        weightlora.errors.OptionError: r=0 is not allowed: give a number of at least 1
    """
    return _validated(TypeAdapter(kind), value, name, strict=strict, error=error)


def check_fields(options: Any) -> None:
    """Raise where a field of a dataclass has a value that its annotation does not allow.

    Fields of types that pydantic does not know are not checked. Numbers are finite, and ``seed`` is a :data:`Seed`.

    Raises:
        OptionError: With the value found, what is allowed and the field.
    """
    _check(_adapters(type(options)), {one.name: getattr(options, one.name) for one in fields(options)})


def check_arguments(taker: Callable[..., Any] | type, given: Mapping[str, Any]) -> None:
    """Raise where a value is not what a function's argument of this name, or a dataclass's field, is annotated with.

    Raises:
        OptionError: With the value found, what is allowed and the argument.

    Example:
        >>> def build(*, steps: int | None = None) -> None: ...
        >>> check_arguments(build, {"steps": None})
        >>> check_arguments(build, {"steps": 2.5})
        Traceback (most recent call last):
        ...
        weightlora.errors.OptionError: steps=2.5 is not allowed: give a whole number
    """
    _check(_adapters(taker), given)


def read_value(option: str, text: str) -> Any:
    """Return the value of a text by the rules of YAML; ``1e-3`` is a number too.

    Args:
        option: For the error.
        text: What was written.

    Raises:
        OptionError: It is no YAML.

    Example:
        >>> read_value("x", "1e-3"), read_value("x", "true"), read_value("x", "[1, 2]")
        (0.001, True, [1, 2])
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a bad date, or a number of 5,000 digits
        reason = " ".join(str(error).split())
        raise OptionError(
            f"{option}={text!r:.80} is not allowed: give a number, a word or a list ({reason})"
        ) from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_pairs(option: str, texts: Sequence[str], such_as: str = "head_steps=0") -> dict[str, Any]:
    """Return ``["gate_lr=5.0", ...]`` as a mapping; values are read as YAML.

    Raises:
        OptionError: A text is no ``name=value``, or a name is given twice.

    Example:
        >>> read_pairs("rule_options", ["gate_lr=5.0", "head_steps=0"])
        {'gate_lr': 5.0, 'head_steps': 0}
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value.strip()):
            raise OptionError(f"{option}={text!r} is not allowed: give name=value, such as {such_as}")
        if name in pairs:
            raise OptionError(f"{option}: {name} is given twice; give it once")
        pairs[name] = read_value(f"{option}: {name}", value)
    return pairs


@cache
def _adapters(taker: Callable[..., Any] | type) -> Mapping[str, TypeAdapter[Any]]:
    """What checks each argument or field, as far as pydantic knows its type and the type is there at run time."""
    found: dict[str, TypeAdapter[Any]] = {}
    for base in reversed(taker.__mro__ if isinstance(taker, type) else (taker,)):
        scope = vars(import_module(base.__module__))
        for name, annotation in get_annotations(base).items():
            with suppress(NameError, TypeError, PydanticUserError):
                holder = SimpleNamespace(__annotations__={name: annotation})
                [hint] = get_type_hints(holder, scope, include_extras=True).values()
                found[name] = TypeAdapter(Seed if name == "seed" else _bounded(hint))
    return found


def _bounded(hint: Any) -> Any:
    """A plain annotation with the bounds of its numbers; any other as it is."""
    for plain, bounded in _PLAIN.items():
        if hint in (plain, plain | None):
            return bounded if hint is plain else bounded | None
    return hint


def _check(adapters: Mapping[str, TypeAdapter[Any]], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in adapters:
            _validated(adapters[name], value, name, strict=True, error=OptionError)


def _validated(adapter: TypeAdapter[Any], value: Any, name: str, *, strict: bool, error: type[WeightLoraError]) -> Any:
    try:
        return adapter.validate_python(_plain(value), strict=strict)
    except ValidationError as found:
        fault = _fault(found, value)
        if not fault.allowed:
            raise error(f"{name} {'lacks' if fault.missing else 'has an unknown entry'} {fault.path[-1]!r}") from found
        allowed = fault.allowed if fault.path else _range(adapter.core_schema, fault.allowed)
        inside = f" in the place of {fault.value!r:.40}" if fault.path else ""
        raise error(f"{name}={value!r:.80} is not allowed: give {allowed}{inside}") from found


def _range(schema: Any, allowed: str) -> str:
    """A bound that a number has passed, with the other one; the far ones that stand for no limit are left out."""
    schema = schema.get("schema", schema)  # of a value that may be None
    bounds = [(key, schema[key]) for key in ("ge", "gt", "le", "lt") if abs(schema.get(key, MOST)) < MOST]
    texts = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    both = f"a number of {' and '.join(f'{texts[key]} {bound:.10g}' for key, bound in bounds)}"
    return both if len(bounds) == 2 and allowed.startswith("a number of") else allowed


def _fault(error: ValidationError, value: Any) -> Fault:
    """The first fault; where a value could be of several kinds, with what each of them allows."""
    found = error.errors(include_url=False)
    paths = [_path(value, one["loc"]) for one in found]
    first, path = found[0], paths[0]
    if first["type"] in ("missing", "extra_forbidden"):
        entry = first["loc"][-1]
        return Fault(
            (*path, entry) if first["type"] == "missing" else path, first["input"], "", first["type"] == "missing"
        )
    same = [one for one, there in zip(found, paths, strict=True) if there == path]
    return Fault(path, first["input"], " or ".join(dict.fromkeys(map(_allowed, same))))


def _path(value: Any, location: Sequence[str | int]) -> tuple[str | int, ...]:
    """The entries that lead to a place; pydantic names the kinds among which it chose, too."""
    path: list[str | int] = []
    for part in location:
        inner = isinstance(value, Mapping) and part in value
        if inner or (isinstance(value, list | tuple) and isinstance(part, int)):
            value = cast("Any", value)[part]
            path.append(part)
    return tuple(path)


def _allowed(error: Any) -> str:
    text = _ALLOWED.get(error["type"])
    return error["msg"].removeprefix("Input should be ") if text is None else text.format(**error.get("ctx", {}))


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in cast("list[Any]", value)]
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value
