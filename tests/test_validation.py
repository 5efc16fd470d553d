"""A wrong value of any kind is one line: the value, what is allowed, the option."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import AfterValidator
from typing_extensions import TypedDict

from weightlora.errors import DataError, OptionError
from weightlora.validation import (
    Count,
    Natural,
    Number,
    Positive,
    Seed,
    Share,
    Text,
    check_arguments,
    check_fields,
    checked,
    first_fault,
)


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("an even number")
    return value


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [
        (int, True, "a whole number"),
        (int, 1.0, "a whole number"),
        (float, True, "a finite number"),
        (Number, float("nan"), "a finite number"),
        (Positive, 0, "a number of more than 0"),
        (Share, 1.0, "a number of at least 0 and less than 1"),
        (Share | None, -0.5, "a number of at least 0 and less than 1"),
        (Count, 0, "a number of at least 1"),
        (Natural, 10**400, "a number of at most 2147483647"),
        (Seed, -1, "a number of at least 0"),
        (bool, 1, "true or false"),
        (str, 1, "text"),
        (Text, " ", "a text that is not empty"),
        (Literal["scale", "keep"], "half", "'scale' or 'keep'"),
        (Literal["input"] | None, "x", "'input'"),
        (int | Literal["auto"], "x", "a whole number or 'auto'"),
        (list[int], 1, "a list"),
        (Sequence[int] | int, "ab", "a list or a whole number"),
        (Mapping[str, int], [1], "a mapping"),
        (Annotated[int, AfterValidator(_even)], 3, "an even number"),
        (Callable[..., Any], 3, "callable"),
    ],
)
def test_what_is_allowed_is_said(kind, value, allowed):
    with pytest.raises(OptionError) as caught:
        checked(kind, value, "x")
    assert str(caught.value) == f"x={value!r:.80} is not allowed: give {allowed}"


def test_a_value_in_a_list_or_a_mapping_is_named():
    with pytest.raises(DataError, match=r"^ranks=\[2, 'x'\] is not allowed: give a whole number in the place of 'x'$"):
        checked(Sequence[int] | int | None, [2, "x"], "ranks", error=DataError)
    assert first_fault(list[Row], [{"r": 1, "at": [1.0]}]) is None
    fault = first_fault(list[Row], [{"r": 1, "at": [1.0]}, {"r": 1, "at": [2, None]}])
    assert (fault.path, fault.value, fault.allowed) == ((1, "at", 1), None, "a finite number")
    lacking = first_fault(list[Row], [{"r": 1}])
    assert (lacking.path, lacking.missing) == ((0, "at"), True)
    with pytest.raises(OptionError, match=r"^rows lacks 'at'$"):
        checked(list[Row], [{"r": 1}], "rows")


def test_texts_are_read_where_they_are_asked_for():
    for kind, text, value in ((int, "8", 8), (float, "1e-3", 0.001), (bool, "no", False), (int | None, "3", 3)):
        assert checked(kind, text, "x", strict=False) == value
        with pytest.raises(OptionError):
            checked(kind, text, "x")
    for kind in (int, float, bool):
        with pytest.raises(OptionError, match="x='maybe' is not allowed: give"):
            checked(kind, "maybe", "x", strict=False)


def test_numbers_of_numpy_are_numbers():
    assert type(checked(int, np.int64(3), "x")) is int
    assert type(checked(float, np.float32(0.5), "x")) is float
    assert checked(list[int], [np.int32(1)], "x") == [1]
    with pytest.raises(OptionError):
        checked(int, np.bool_(True), "x")


class Row(TypedDict):
    r: Count
    at: list[float]


class Unknown:
    """Pydantic knows nothing of it."""


@dataclass
class Options:
    steps: int | None = None
    learning_rate: float = 1.0
    seed: int = 0
    own: Unknown | None = None
    later: "NotThere" = None  # noqa: F821


def test_fields_and_arguments_are_checked_by_their_annotations():
    check_fields(Options(own=3, later=3))
    for wrong in ({"steps": 1.5}, {"steps": 10**30}, {"learning_rate": float("inf")}, {"seed": -1}, {"seed": True}):
        [name] = wrong
        with pytest.raises(OptionError, match=f"^{name}="):
            check_fields(Options(**wrong))
        with pytest.raises(OptionError, match=f"^{name}="):
            check_arguments(Options, wrong)
    check_arguments(Options, {"more": 1})


def test_arguments_of_a_function():
    def build(*, ranks: Sequence[int] | int | None = None, alpha: Literal["scale", "keep"] = "scale"): ...

    check_arguments(build, {"ranks": (1, 2), "alpha": "keep", "more": object()})
    for wrong in ({"ranks": [1.5]}, {"ranks": "ab"}, {"alpha": "half"}):
        with pytest.raises(OptionError, match=f"^{next(iter(wrong))}="):
            check_arguments(build, wrong)
