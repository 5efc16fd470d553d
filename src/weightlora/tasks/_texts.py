"""The texts of a split: none is missing, and empty ones are not passed over in silence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, WeightLoraWarning

if TYPE_CHECKING:
    from datasets import Dataset

    from weightlora.tasks._place import Place
    from weightlora.tasks.base import Task


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
