"""Keep the libraries' chatter off the screen, so that ours can be read."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress

from weightlora.text import printable


def quiet_imports() -> None:
    """Drop the line that bitsandbytes logs when it is imported, about a faster kernel for quantised models.

    PEFT imports bitsandbytes wherever it is installed, whether a model is quantised or not, so that the line would
    appear in every command. Whatever else bitsandbytes logs is printed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_says_no_kernel)


def quiet_casts() -> None:
    """Drop the line that bitsandbytes logs for each 8-bit layer and step, about the type of its input."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_says_no_cast)


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Silence transformers' reports and bars for the block."""
    from transformers.utils import logging as reports

    level = reports.get_verbosity()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    with suppress(ImportError):  # the extra `train`
        from datasets import disable_progress_bars

        disable_progress_bars()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        reports.enable_progress_bar()


@contextmanager
def one_line_warnings() -> Generator[None]:
    """Print warnings without the line of code they came from, for the block; deprecations are not the user's.

    Nor is PEFT's that a base model without a ``config.json``, such as a GGUF file, has none: nobody resized its
    vocabulary here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", "Could not find a config file in ", UserWarning)
        warnings.showwarning = _one_line  # the documented hook; catch_warnings puts the old one back
        yield


def _says_no_kernel(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


def _says_no_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.getMessage()


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"weightlora: warning: {printable(str(message))}", file=sys.stderr)
