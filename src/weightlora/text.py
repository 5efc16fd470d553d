"""Hints for error messages: the closest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar known word, for the end of an error; empty if none is similar.

    Example:
        >>> closest("kepe", ["keep", "rule"]), closest("xyz", ["keep"])
        (" (closest: 'keep')", '')
    """
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (closest: {found[0]!r})" if found else ""
