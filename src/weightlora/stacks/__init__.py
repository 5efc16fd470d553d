"""Training stacks that a plan can be written for, one file each; a new one is a file and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from weightlora.errors import OptionError
from weightlora.text import closest

if TYPE_CHECKING:
    from weightlora.stacks.base import Stack


@dataclass(frozen=True)
class StackEntry:
    """A line of the registry; the file ``weightlora.stacks.<name>`` holds the ``STACK``."""

    name: str
    """What users type."""
    title: str
    """Its own name."""
    version: str
    """The version that the output is checked against."""

    def load(self) -> Stack:
        """Return how plans are written for it."""
        return import_module(f"weightlora.stacks.{self.name}").STACK


#: Every stack that ``emit`` knows.
STACKS = (
    StackEntry("peft", "PEFT", "0.21.2"),
    StackEntry("trl", "TRL", "1.16.0"),
    StackEntry("axolotl", "Axolotl", "0.19.0"),
    StackEntry("llamafactory", "LLaMA-Factory", "0.9.5"),
    StackEntry("swift", "ms-swift", "4.6.0"),
    StackEntry("unsloth", "Unsloth", "2026.10.9"),
    StackEntry("torchtune", "torchtune", "0.6.1"),
    StackEntry("litgpt", "LitGPT", "0.5.13"),
)


def stack_of(name: str) -> StackEntry:
    """Return the stack of that name.

    Raises:
        OptionError: There is none.

    Example:
        >>> stack_of("axolotl").title
        'Axolotl'
    """
    known = {entry.name: entry for entry in STACKS}
    if name not in known:
        raise OptionError(f"{name!r} is no training stack{closest(name, known)}: give one of {', '.join(known)}")
    return known[name]
