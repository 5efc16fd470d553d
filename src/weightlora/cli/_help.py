"""The parsers of the commands; help for the options of a recipe, wrapped to the width of the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from weightlora.runs.recipe import MethodOptions, ModelOptions, TaskOptions

_TYPES: Mapping[Any, str] = {str: "TEXT", int: "INT", float: "FLOAT", bool: "true|false"}
#: As argparse has it, which leaves two columns free.
_MARGIN = 2


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    help: str,
    description: str = "",
    examples: Sequence[str],
    recipe: bool = False,
    config: bool = False,
) -> argparse.ArgumentParser:
    """Add and return a command.

    Args:
        commands: Where it is added.
        name: Of the command.
        run: What it does.
        help: A line of ``weightlora --help``.
        description: What it does, in its own help.
        examples: How it is called; the last lines of its help.
        recipe: It also takes the options of a recipe, which ``main`` leaves as words.
        config: And a YAML file of them.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=_paragraph(description),
        epilog="\n".join([*([_recipe_help()] if recipe else []), *map(example, examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if config:
        parser.add_argument("--config", type=Path, help="YAML file of 'option: value' lines")
    parser.set_defaults(run=run, takes_recipe=recipe)
    return parser


def _recipe_help() -> str:
    """Type, default and meaning of a recipe's own options."""
    note = _paragraph("Options of the recipe. Those of transformers' TrainingArguments are options too.")
    return f"{note}\n\n{options_help(ModelOptions, TaskOptions, MethodOptions)}\n"


def _paragraph(text: str) -> str:
    return "\n".join(_wrapped(text, _columns(None), ""))


def example(command: str, width: int | None = None) -> str:
    r"""Return a command as the last line of a help, wrapped so that a shell still reads it.

    Example:
        >>> print(example("weightlora train --time 0.5 --seed 1", width=40))
        example: weightlora train --time 0.5 \
            --seed 1
    """
    lines = textwrap.wrap(
        f"example: {command}",
        _columns(width) - 2,
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return " \\\n".join(lines)


def options_help(*parts: type, prefix: str = "--", width: int | None = None) -> str:
    """Return the options of dataclasses as text for the end of a command's help.

    Args:
        parts: Dataclasses whose fields have a ``help`` text in their metadata; each is a section under its docstring.
        prefix: The text before a name; empty for options of a file.
        width: Columns; None is the terminal's.

    Example:
        >>> @dataclasses.dataclass
        ... class Limits:
        ...     '''The limits.'''
        ...     time: float = dataclasses.field(default=0.5, metadata={"help": "share of LoRA's step time"})
        >>> print(options_help(Limits))
        The limits:
          --time FLOAT (default: 0.5)
              share of LoRA's step time
    """
    width = _columns(width)
    return "\n\n".join("\n".join([f"{_title(part)}:", *_lines(part, prefix, width)]) for part in parts)


def _columns(width: int | None) -> int:
    return (shutil.get_terminal_size().columns if width is None else width) - _MARGIN


def _title(part: type) -> str:
    return (part.__doc__ or part.__name__).splitlines()[0].rstrip(".")


def _lines(part: type, prefix: str, width: int) -> list[str]:
    hints = get_type_hints(part)
    lines: list[str] = []
    for field in dataclasses.fields(part):
        meaning = field.metadata["help"]
        takes = _type_text(hints[field.name], optional="nargs" in field.metadata)
        said = "default:" in meaning  # where None stands for something that depends on the rest
        head = f"{prefix}{field.name} {takes}" + ("" if said else f" (default: {_default_text(field)})")
        lines += _wrapped(head, width, "  ") + _wrapped(meaning, width, "      ")
    return lines


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _type_text(hint: Any, *, optional: bool = False) -> str:
    """The type as a user writes it: ``INT``, ``{a,b}``, ``TEXT ...``; in brackets where the value can be left out."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        [hint] = [kind for kind in get_args(hint) if kind is not type(None)]
        origin = get_origin(hint)
    if origin is Literal:
        text = "{" + ",".join(map(str, get_args(hint))) + "}"
    elif origin in (list, Sequence):
        text = f"{_TYPES.get(get_args(hint)[0], 'TEXT')} ..."
    else:
        text = _TYPES.get(hint, "TEXT")
    return f"[{text}]" if optional or hint is bool else text


def _default_text(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))
