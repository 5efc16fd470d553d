"""Text for people: the closest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str:
    """Return a hint at the most similar known word, for the end of an error; empty where none is similar.

    Example:
        >>> closest("kepe", ["keep", "rule"]), closest("xyz", ["keep"])
        (" (closest: 'keep')", '')
    """
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (closest: {found[0]!r})" if found else ""
