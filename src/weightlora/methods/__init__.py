"""Every way to spend a LoRA budget, behind one door; each with its paper.

model = make_method("weightlora", keep=0.5).attach(model, lora, batches, total_steps)
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError

if TYPE_CHECKING:
    from weightlora.methods.base import Method as Method


@dataclass(frozen=True)
class MethodEntry:
    """A line of the registry; the method itself lives in the file of the same name."""

    name: str
    summary: str
    paper: str


#: Kept as one readable list. A new method is a file with ``build(**options) -> Method`` and a line here.
METHODS = (
    MethodEntry("lora", "rank r on every site: the budget", "Hu et al. 2021, arXiv:2106.09685"),
    MethodEntry("random", "K random sites: the control", "RLoRA, Veprikov et al., Table 7"),
    MethodEntry("weightlora", "the K sites that matter, at rank r", "Veprikov et al., section 2"),
    MethodEntry("weightlora_plus", "the same sites at the rank that plain LoRA's budget pays for", "section 2.2"),
)


def make_method(name: str, **options: Any) -> Method:
    """Return the method of that name.

    Args:
        name: One of :data:`METHODS`.
        options: The method's own settings, such as ``keep`` and ``seed``.

    Raises:
        OptionError: There is no such method, or it has no such option.

    Example:
        >>> make_method("random", keep=0.5, seed=3).callbacks()
        []
    """
    names = [entry.name for entry in METHODS]
    if name not in names:
        raise OptionError(f"method={name!r} is unknown{_closest(name, names)}; there are {', '.join(names)}")
    build = import_module(f"weightlora.methods.{name}").build
    parameters = inspect.signature(build).parameters
    known = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):  # they go on to select()
        known |= set(inspect.signature(import_module("weightlora.selection").select).parameters)
    for option in sorted(set(options) - known):
        raise OptionError(f"{name} has no option {option!r}{_closest(option, sorted(known))}")
    return build(**options)


def __getattr__(attribute: str) -> Any:
    if attribute == "Method":  # the protocol's file needs torch's types, the registry does not
        return import_module("weightlora.methods.base").Method
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


def _closest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (closest: {close[0]!r})" if close else ""
