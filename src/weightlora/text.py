"""Hints for error messages, texts of users made safe to show, names in the order of their numbers, sizes and times."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_MANY = 1_000_000


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


def printable(text: str) -> str:
    r"""Return ``text`` with escapes in place of what a terminal would obey or could not show; line breaks stay.

    Example:
        >>> printable("a\x1b[31mb\ud800")
        'a\\x1b[31mb\\ud800'
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def rounded(value: float) -> str:
    """Return a number with four significant digits; whole ones below a million are exact.

    Example:
        >>> [rounded(value) for value in (0.123456, 15, 331776, 20.0, 1234.56, 1e300, float("nan"))]
        ['0.1235', '15', '331,776', '20', '1,235', '1e+300', 'nan']
    """
    short = value if value in range(-_MANY, _MANY) else float(f"{value:.4g}")
    return f"{short:,.0f}" if 1000 <= abs(short) < _MANY else f"{short:.4g}"


def gigabytes(count: int) -> str:
    """Return a number of bytes in GB, in at most five characters below 10,000.

    Example:
        >>> gigabytes(1_500_000_000), gigabytes(140_000_000_000), gigabytes(1_400_000_000_000)
        ('1.50', '140.0', '1,400')
    """
    gb = count / 1e9
    return f"{gb:,.2f}" if gb < 99.995 else f"{gb:,.1f}" if gb < 999.95 else f"{gb:,.0f}"


def one_line(text: str) -> str:
    r"""Return ``text`` as :func:`printable` does, with spaces in place of line breaks.

    Example:
        >>> one_line("two\nlines\x07")
        'two lines\\x07'
    """
    return " ".join(printable(text).splitlines())


#: Backslashes where every Markdown reads them, entities where only some do.
_MARKDOWN = {
    **{char: f"\\{char}" for char in "\\`*|[]"},
    **{char: f"&#{ord(char)};" for char in "~$"},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
}
_LATEX = {
    **{char: f"\\{char}" for char in "&%_#${}"},
    **{char: f"{{{char}}}" for char in "[]*"},  # behind a line's end they are its options
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
}


def in_markdown(text: str) -> str:
    r"""Return ``text`` for a cell or a line of Markdown, without links, tags, code, emphasis or columns of its own.

    Example:
        >>> in_markdown("self_attn.q_proj"), in_markdown("a|<b>\n[c](d)")
        ('self_attn.q_proj', 'a\\|&lt;b&gt; \\[c\\](d)')
    """
    escaped = one_line(text).translate(str.maketrans(_MARKDOWN))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", escaped)  # within a word it is only a letter


def in_latex(text: str) -> str:
    r"""Return ``text`` for LaTeX, without commands, groups, comments or columns of its own.

    Example:
        >>> print(in_latex(r"\input{/etc/passwd}"), in_latex("lora_r & 5 %"))
        \textbackslash{}input\{/etc/passwd\} lora\_r \& 5 \%
    """
    return one_line(text).translate(str.maketrans(_LATEX))


def in_code(text: str) -> str:
    """Return ``text`` for a code span of Markdown, which ends at the first backtick.

    Example:
        >>> in_code("a`b")
        "a'b"
    """
    return one_line(text).replace("`", "'")


def natural(text: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10.

    Example:
        >>> sorted(["layer.10", "layer.2"], key=natural)
        ['layer.2', 'layer.10']
    """
    parts = re.split(r"0*(\d+)", text)
    return [(len(part), part) if i % 2 else (-1, part) for i, part in enumerate(parts)]  # a longer number is larger


def duration(seconds: float) -> str:
    """Return ``seconds`` in the unit that fits.

    Example:
        >>> duration(8.4), duration(600), duration(9000), duration(200_000)
        ('8 s', '10 min', '2.5 h', '55.6 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
