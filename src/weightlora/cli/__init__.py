"""The command line: one small file a command; a user's mistake is one line and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from weightlora import __version__
from weightlora.cli import (
    analyse,
    bench,
    bench_merge,
    check,
    demo,
    doctor,
    emit,
    estimate,
    export,
    methods,
    paper,
    report,
    select,
    show,
    squeeze,
    train,
)
from weightlora.cli._streams import CheckedOutput, one_line_warnings, quiet_imports, say
from weightlora.errors import OptionError, WeightLoraError
from weightlora.fast.allocator import keep_freed_memory
from weightlora.text import printable

_COMMANDS = (
    demo,
    select,
    train,
    show,
    report,
    emit,
    check,
    export,
    squeeze,
    estimate,
    analyse,
    bench,
    bench_merge,
    paper,
    methods,
    doctor,
)


class _CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and leaves the exit to :func:`main`."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: its own, 0 or 1; 2 after a user's mistake, 130 after Ctrl-C.

    Raises:
        SystemExit: After ``--help``, or where the reader of the output has closed the pipe.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _CommandParser(
        prog="weightlora", description="LoRA that spends its budget where it counts.", epilog="example: weightlora demo"
    )
    parser.set_defaults(takes_recipe=False)
    parser.add_argument("--version", action="version", version=f"weightlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    if " ".join(words[:2]) in commands.choices:  # a command of two words
        words[:2] = [" ".join(words[:2])]
    try:
        with CheckedOutput(), one_line_warnings():
            chosen, rest = parser.parse_known_args(words)
            if rest and not chosen.takes_recipe:  # its options are checked when the recipe is read
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            chosen.rest = rest
            quiet_imports()
            keep_freed_memory()
            return chosen.run(chosen) or 0
    except WeightLoraError as error:
        say(f"weightlora: error: {printable(' '.join(str(error).splitlines()))}")
        return 2
    except KeyboardInterrupt:
        say("weightlora: stopped")
        return 130
