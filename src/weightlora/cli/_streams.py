"""What the commands print, to a disk that may be full or a pipe that may be closed; libraries add nothing to it."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from weightlora.errors import OutputError
from weightlora.text import printable


class CheckedOutput:
    """Standard output for a block, with one error at its end if something could not be printed.

    Libraries print too, and what they catch or turn into errors of their own is seen here all the same.

    Raises:
        OutputError: Standard output cannot be written.
        SystemExit: With code 1 and without a word, as when other tools' readers close the pipe.
    """

    def __init__(self) -> None:
        self._stream: TextIO = sys.stdout or io.StringIO()  # pyright: ignore[reportUnnecessaryComparison]  # `>&-`
        self._fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what the stream has: encoding, isatty, fileno and the rest."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream."""
        return self._checked(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._checked(self._stream.flush)

    def __enter__(self) -> None:
        sys.stdout = self  # pyright: ignore[reportAttributeAccessIssue]  # what contextlib.redirect_stdout does

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        sys.stdout = self._stream
        with suppress(OSError):
            self.flush()
        if self._fault is None:
            return
        discard(self._stream)
        if kind is KeyboardInterrupt:  # it stopped the reader, too
            return
        if isinstance(self._fault, BrokenPipeError):
            raise SystemExit(1) from error
        reason = self._fault.strerror or self._fault
        raise OutputError(f"cannot print to standard output: {reason}; redirect it elsewhere") from self._fault

    def _checked(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as fault:
            self._fault = fault
            raise


def say(text: str) -> None:
    """Print a line to standard error, where it can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Lead a stream that cannot be written to the null device: Python flushes it at its end, and would complain."""
    with suppress(OSError), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def quiet_imports() -> None:
    """Drop the line that bitsandbytes logs when it is imported, about a faster kernel for quantised models.

    PEFT imports bitsandbytes wherever it is installed, whether a model is quantised or not, so that the line would
    appear in every command. Whatever else bitsandbytes logs is printed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )


def quiet_casts() -> None:
    """Drop the line that bitsandbytes logs for each 8-bit layer and step, about the type of its input."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(
        lambda record: "inputs will be cast" not in record.getMessage()
    )


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


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"weightlora: warning: {printable(str(message))}", file=sys.stderr)
