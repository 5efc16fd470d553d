"""The terminal that all commands print to: what a user named is shown as it is written."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
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


def draws_pictures(console: Console) -> bool:
    """Return whether pictures can be drawn; where they cannot, a line says what is missing."""
    if find_spec("matplotlib") is not None:
        return True
    console.print("no pictures: they need matplotlib; run: pip install 'weightlora[report]'", highlight=False)
    return False


@contextmanager
def shown_log(console: Console) -> Generator[None]:
    """Print what the package logs, for the block: the learning rate, and what scoring costs."""
    log, handler = logging.getLogger("weightlora"), _LogLines(console)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _LogLines(logging.Handler):
    """Prints each record as a line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        self._console.print(record.getMessage(), highlight=False)
