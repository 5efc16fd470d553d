"""How far a loop is, where no bar can be shown: a line of the log every half minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from weightlora.model.distributed import is_first

_LOG = logging.getLogger(__name__)
EVERY = 30.0
"""Seconds from line to line."""


class Progress:
    """A bar on a terminal, and elsewhere a line of the log now and then, as for a training.

    Args:
        bar: Whose ``total`` is the most steps there are.
        what: Name of the loop, or of its first phase.
        now: A clock, in seconds.
    """

    def __init__(self, bar: tqdm[Any], what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._bar, self._what, self._now = bar, what, now
        self._done, self._last = 0, now()

    def set_description(self, what: str) -> None:
        """Name the phase."""
        self._what = what
        self._bar.set_description(what)

    def update(self, steps: int = 1) -> None:
        """Go on by ``steps``, and say so where it is time."""
        self._bar.update(steps)
        self._done += steps
        now = self._now()
        if self._bar.disable and is_first() and now - self._last >= EVERY:
            self._last = now
            _LOG.info("%s: %d of %s", self._what, self._done, self._bar.total)
