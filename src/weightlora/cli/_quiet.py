"""Keep the libraries' chatter off the screen, so that ours can be read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Silence transformers' reports and bars for the block; our own warnings are printed as one line each."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with suppress(ImportError):  # the extra `tasks`
        from datasets import disable_progress_bars

        disable_progress_bars()
    with one_line_warnings():
        try:
            yield
        finally:
            logging.set_verbosity(level)
            logging.enable_progress_bar()


@contextmanager
def one_line_warnings() -> Generator[None]:
    """Print warnings without the line of code they came from, for the block; deprecations are not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.showwarning = _one_line  # the documented hook; catch_warnings puts the old one back
        yield


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"weightlora: warning: {message}", file=sys.stderr)
