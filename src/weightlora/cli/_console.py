"""The terminal that all commands print to: what a user named is shown as it is written."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from weightlora.text import printable


class PlainConsole(Console):
    """A rich console that reads no markup or emoji codes in texts and shows control characters as escapes."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return ``text`` as rich prints it; rich calls this for every line, title and cell."""
        return super().render_str(printable(text), **options)
