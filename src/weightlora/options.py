"""Values of options: read from a user's text, and checked by the type that a function or class wants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from weightlora.errors import OptionError

#: The largest whole number of an option, and the largest seed that Python, NumPy and torch all take.
MOST = 2**31 - 1
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``; an open end is not allowed itself.

    Example:
        >>> Range(0, 1, open_most=True).allows(1), str(Range(0, 1, open_most=True))
        (False, 'a number of at least 0 and less than 1')
    """

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False
    but: float | None = None
    """A number outside that stands for something else."""

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        low = value > self.least if self.open_least else value >= self.least
        high = value < self.most if self.open_most else value <= self.most
        return math.isfinite(value) and ((low and high) or value == self.but)

    def __str__(self) -> str:
        low = f"{'more than' if self.open_least else 'at least'} {self.least:g}"
        high = "" if self.most == math.inf else f" and {'less than' if self.open_most else 'at most'} {self.most:.0f}"
        return f"a number of {low}{high}" + ("" if self.but is None else f", or {self.but:g}")


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


def check_types(annotations: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise where a value is not of the type that its annotation says, or a seed is out of its range.

    Numbers are finite. A whole number is a float as well, and NumPy's numbers are numbers; true and false are none.

    Args:
        annotations: Type of each option as it is written in the source, such as ``"int | None"``. Options of other
            types than int, float, bool and str are not checked here.
        values: By option.

    Raises:
        OptionError: With the value and what is allowed.

    Example:
        >>> check_types({"steps": "int | None"}, {"steps": None})
        >>> check_types({"steps": "int | None"}, {"steps": 2.5})
        Traceback (most recent call last):
        ...
        weightlora.errors.OptionError: steps=2.5 is not allowed: give a whole number up to 2147483647 or none
    """
    for name, value in values.items():
        kinds = str(annotations.get(name, "")).split(" | ")
        if name == "seed":
            if isinstance(value, bool) or not (isinstance(value, Integral) and 0 <= int(value) <= MOST_SEED):
                raise OptionError(f"seed={value!r:.80} is not allowed: give a whole number from 0 to {MOST_SEED}")
        elif set(kinds) <= set(_KINDS) and not any(_KINDS[kind][1](value) for kind in kinds):
            allowed = " or ".join(_KINDS[kind][0] for kind in kinds)
            raise OptionError(f"{name}={value!r:.80} is not allowed: give {allowed}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) <= MOST  # pyright: ignore


def _all_whole(values: Sequence[Any]) -> bool:
    return all(map(_is_whole, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e18  # pyright: ignore


#: How a type of an option is called, and which values it has.
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "int": (f"a whole number up to {MOST}", _is_whole),
    "Sequence[int]": ("a list of whole numbers", lambda value: isinstance(value, list | tuple) and _all_whole(value)),
    "float": ("a finite number", _is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "None": ("none", lambda value: value is None),
}
