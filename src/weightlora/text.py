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
    found = similar(word, known, count=1)
    return f" (closest: {found[0]!r})" if found else ""


def similar(word: str, known: Iterable[str], *, count: int, cutoff: float = 0.6) -> list[str]:
    """Return up to ``count`` known words, the most similar first.

    Args:
        word: What was written.
        known: What is allowed.
        count: Most words to return.
        cutoff: Least similarity, from 0 (any word) to 1 (the same).

    Example:
        >>> similar("qerry", ["key", "query", "value"], count=2, cutoff=0.4)
        ['query', 'key']
    """
    return difflib.get_close_matches(word, sorted(known), n=count, cutoff=cutoff)
