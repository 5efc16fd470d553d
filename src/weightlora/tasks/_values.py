"""The values of rows: texts, none of which is missing, and labels with their numbers, which fit the head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, WeightLoraWarning
from weightlora.tasks.base import Place

if TYPE_CHECKING:
    from datasets import Dataset

    from weightlora.tasks.base import Task

#: How programs write a missing value; in a CSV file it is text like any other.
_MISSING = frozenset({"#N/A", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"})


def given_names(task: Task, rows: Dataset) -> tuple[str, ...] | None:
    """Return the labels that the task or the data set names, in the order of their numbers.

    () stands for a regression. None says that they are to be read from the rows.
    """
    from datasets import ClassLabel

    if task.labels is not None:
        return task.labels
    feature = rows.features[task.columns["label"]]
    return tuple(map(str, feature.names)) if isinstance(feature, ClassLabel) else None


def read_labels(labels: Sequence[Any], names: tuple[str, ...] | None, place: Place) -> list[Any]:
    """Return the number of each label, its value in a regression, or its text where names are not known.

    Args:
        labels: Names or their numbers; numbers in a regression.
        names: The labels that the head knows; () in a regression.
        place: For the error.

    Raises:
        DataError: A label is missing, no number in a regression, or none of those that the head knows.
    """
    if names == ():
        return [_number(label, place, i) for i, label in enumerate(labels)]
    if names is None:
        return [_text(label, place, i) for i, label in enumerate(labels)]
    numbers: dict[Any, int] = {str(number): number for number in range(len(names))}
    numbers |= {number: number for number in range(len(names))} | {name: number for number, name in enumerate(names)}
    for i, label in enumerate(labels):
        if isinstance(label, (bool, list, dict)) or label not in numbers:
            raise DataError(
                f"{place.row(i)} has the label {label!r:.60}, which the head does not know; it knows "
                f"{', '.join(names)}; correct the row, or name the label's column with columns: label=..."
            )
    return [numbers[label] for label in labels]


def number_labels(task: Task, rows: Mapping[str, Dataset], places: Mapping[str, Place]) -> dict[str, Dataset]:
    """Return the splits with their labels as a ``ClassLabel`` feature, the same names in all of them.

    The names are those that the training rows' feature has, else the sorted labels of all splits; numbers are sorted by
    their value.

    Raises:
        DataError: All labels are the same, two differ in blanks alone, or two splits number their labels differently.
    """
    column = task.columns["label"]
    given = given_names(task, rows["train"])
    for split, part in rows.items():
        own = given_names(task, part)
        if own is not None and own != given:
            found = "no names" if given is None else ", ".join(given)
            raise DataError(f"{places[split].name} names its labels {', '.join(own)}, the training rows have {found}")
    if given is not None:
        _require_two(given, places)
        return dict(rows)
    texts = {split: read_labels(part[column][:], None, places[split]) for split, part in rows.items()}
    names = tuple(sorted({text for some in texts.values() for text in some}, key=_order))
    _require_two(names, places)
    _check_names(names, texts, places)
    numbers = {name: number for number, name in enumerate(names)}
    return {
        split: _with_labels(part, column, [numbers[text] for text in texts[split]], names)
        for split, part in rows.items()
    }


def check_labels(task: Task, rows: Mapping[str, Dataset]) -> None:
    """Check that the training rows have labels to learn, and the measured ones enough for the metric.

    Raises:
        DataError: A regression is measured on one row.

    Warns:
        WeightLoraWarning: No training row has some of the labels that the head knows.
    """
    names = given_names(task, rows["train"])
    assert names is not None, "number_labels names them"
    if not names:
        for split, part in rows.items():
            if split != "train" and len(part) < 2:
                raise DataError(f"the split {split!r} has one row; a correlation needs two rows or more")
        return
    column = task.columns["label"]
    seen = set(read_labels(rows["train"].unique(column), names, Place("the split 'train'")))
    lacking = [name for number, name in enumerate(names) if number not in seen]
    if lacking:
        warnings.warn(
            f"no training row has the label {', '.join(map(repr, lacking[:5]))}{', ...' * (len(lacking) > 5)}, which "
            "the head knows; it is not learned: add rows, or raise max_train_samples",
            WeightLoraWarning,
            stacklevel=3,
        )


def _number(label: Any, place: Place, row: int) -> float:
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place.row(row)} has the label {label!r:.60}, which is no number; a regression needs one")
    return number


def _text(label: Any, place: Place, row: int) -> str:
    if label is None or isinstance(label, (list, dict, bytes)) or not str(label).strip() or label != label:
        raise DataError(
            f"{place.row(row)} has the label {label!r:.60}; fill it in or remove the row, or name the label's column "
            "with columns: label=..."
        )
    return str(label)


def _order(name: str) -> tuple[float, str]:
    """Numbers by their value, before other texts."""
    try:
        return (float(name), name) if math.isfinite(float(name)) else (math.inf, name)
    except ValueError:
        return math.inf, name


def _require_two(names: Sequence[str], places: Mapping[str, Place]) -> None:
    if len(names) < 2:
        raise DataError(
            f"all labels of {' and '.join(place.name for place in places.values())} are {names[0]!r}; a classification "
            "needs two or more; for numbers take task=regression, or name the label's column with columns: label=..."
        )


def _check_names(names: Sequence[str], texts: Mapping[str, Sequence[str]], places: Mapping[str, Place]) -> None:
    def first(name: str) -> str:
        return next(places[split].row(some.index(name)) for split, some in texts.items() if name in some)

    bare: dict[str, str] = {}
    for name in names:
        other = bare.setdefault(_without_blanks(name), name)
        if other != name:
            raise DataError(
                f"{first(name)} has the label {name!r}, {first(other)} has {other!r}: they differ in blanks or "
                "invisible characters alone; write them alike"
            )
    for name in names:
        if name in _MISSING:
            warnings.warn(
                f"{first(name)} has the label {name!r}, which is taken as a label of its own; remove the row if its "
                "label is missing",
                WeightLoraWarning,
                stacklevel=4,
            )


def _without_blanks(name: str) -> str:
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in name)
    return " ".join(shown.split())


def _with_labels(rows: Dataset, column: str, numbers: list[int], names: tuple[str, ...]) -> Dataset:
    import pyarrow as pa
    from datasets import ClassLabel

    feature = ClassLabel(names=list(names))
    return rows.remove_columns(column).add_column(column, pa.array(numbers), feature=feature)  # pyright: ignore


# -- texts ------------------------------------------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    """Whether a value is a text, or a finite number, which is written as text.

    Example:
        >>> is_text("a"), is_text(2.5), is_text(True), is_text(None)
        (True, True, False, False)
    """
    return isinstance(value, str) or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )


def check_texts(task: Task, rows: Dataset, place: Place, roles: Iterable[str]) -> None:
    """Raise where a value of one of these roles is no text.

    Raises:
        DataError: With the value and the row.

    Warns:
        WeightLoraWarning: Some texts are empty.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table: Any = rows.with_format("arrow")[:]
    for role in roles:
        if role not in task.columns:
            continue
        column = task.columns[role]
        values: Any = table[column]  # as an Arrow column: a benchmark has millions of texts
        compute: Any = pc
        texts = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        wrong = compute.index(compute.is_null(values), True).as_py() if texts else 0
        if wrong >= 0:
            raise DataError(
                f"{place.row(wrong)} has {values[wrong].as_py()!r} as its {column!r}, which is no text; fill it in or "
                f"remove the row, or name another column with columns: {role}=..."
            )
        # A chunk at a time: trimming copies the texts.
        trimmed = (compute.utf8_trim_whitespace(chunk) for chunk in values.chunks)
        blank = pa.chunked_array([compute.equal(texts, "") for texts in trimmed], pa.bool_())
        count = compute.sum(blank).as_py()
        if count:
            first = place.row(compute.index(blank, True).as_py())
            warnings.warn(
                f"{count} of {len(values)} rows have an empty {column!r}, such as {first}; remove them if a text is "
                "missing",
                WeightLoraWarning,
                stacklevel=4,
            )
