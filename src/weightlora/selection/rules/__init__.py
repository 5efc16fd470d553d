"""Rules that score the sites, one file each; a new one is a file and a line here, or a class of your own."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from weightlora.errors import OptionError
from weightlora.text import closest
from weightlora.validation import check_arguments

if TYPE_CHECKING:
    from weightlora.selection.rules.base import Rule

_HERE = "weightlora.selection.rules"


@dataclass(frozen=True)
class RuleEntry:
    """A name that users give, and the class that it stands for."""

    name: str
    summary: str
    path: str
    """``package.module:Class``."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the name sets, where it is not the class's default."""


#: Every rule that ``select`` and ``--rule`` take by a name of one word; the first one of a class is its own name.
RULES = (
    RuleEntry("first_order", "size of B's mean gradient at B = 0", f"{_HERE}.first_order:FirstOrder"),
    RuleEntry(
        "pursuit",
        "the same, a few sites at a time, after those before were trained",
        f"{_HERE}.pursuit:Pursuit",
    ),
    RuleEntry("integrated", "share of the loss that a short LoRA training saved", f"{_HERE}.integrated:Integrated"),
    RuleEntry("integrated_ranks", "the same of every single rank", f"{_HERE}.integrated:Integrated", {"per": "rank"}),
    RuleEntry(
        "even_ranks",
        "the best ranks of each site, of all sites alike",
        f"{_HERE}.integrated:Integrated",
        {"per": "rank", "most_ranks": "even"},
    ),
    RuleEntry("paper", "gates under a hard threshold: the paper's", f"{_HERE}.paper:StoIHT"),
    RuleEntry("kappa_tune", "inverse condition number of the frozen weight", f"{_HERE}.kappa_tune:KappaTune"),
    RuleEntry("stratified", "random, of every projection alike", f"{_HERE}.stratified:Stratified"),
)


def rule_entry(name: str) -> RuleEntry:
    """Return the registry's line of that name, or a line for ``package.module:Class``; nothing is imported.

    Raises:
        OptionError: There is none; the text names the closest.
    """
    known = {entry.name: entry for entry in RULES}
    if ":" in name:
        return RuleEntry(name, "a rule of your own", name)
    if name not in known:
        raise OptionError(
            f"rule={name!r} is not allowed{closest(name, known)}: give one of {', '.join(known)}, or your own as "
            "package.module:Class"
        )
    return known[name]


def rule_of(rule: str | Rule, **settings: Any) -> Rule:
    """Return the rule of that name, or the given rule, with ``settings`` changed.

    Args:
        rule: One of :data:`RULES`, the import path ``package.module:Class`` of your own, which is looked for in the
            current directory too, or a rule object.
        settings: Fields of the rule, such as ``gate_lr``.

    Raises:
        OptionError: There is no such rule or setting, or a value is out of its range.

    Example:
        >>> rule_of("paper", gate_lr=1.0)
        StoIHT(head_steps=0, gate_lr=1.0, order='alternating', threshold_every=1)
    """
    from weightlora.selection.rules.base import Rule

    if isinstance(rule, Rule):
        _check_settings(rule.name, type(rule), settings)
        return replace(rule, **settings)
    if not isinstance(rule, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        names = ", ".join(entry.name for entry in RULES)
        raise OptionError(f"rule={rule!r:.80} is not allowed: give a rule or one of {names}")
    entry = rule_entry(rule)
    kind = _rule_class(entry.path)
    given = {**entry.settings, **settings}
    _check_settings(rule, kind, given)
    missing = [f.name for f in fields(kind) if f.init and f.name not in given and _has_no_default(f)]
    if missing:
        raise OptionError(f"rule {rule} has no default for {', '.join(missing)}; give it in rule_options")
    return kind(**given)


def require_training_rule(rule: Rule) -> None:
    """Raise unless the rule trains the adapters that ``warm_start`` uses.

    Raises:
        OptionError: With the rules that do.

    Example:
        >>> require_training_rule(rule_of("integrated"))
    """
    if not rule.trains_adapters:
        others = [entry.name for entry in RULES if rule_of(entry.name).trains_adapters]
        raise OptionError(
            f"warm_start=True: rule={rule.name!r} trains no adapters while it scores; give one of {', '.join(others)}, "
            "or leave warm_start out"
        )


def settings_of(rule: Rule) -> dict[str, Any]:
    """Return the rule's settings by name, as a plan records them."""
    return {f.name: vars(rule)[f.name] for f in fields(rule) if f.init}


def _check_settings(name: str, kind: type[Rule], settings: Mapping[str, Any]) -> None:
    """Raise where a setting is unknown, or not of the type of its field."""
    known = [f.name for f in fields(kind) if f.init]
    for setting in settings:
        if setting not in known:
            found = ", ".join(known) or "none"
            raise OptionError(f"rule {name} has no setting {setting!r}{closest(setting, known)}; it has {found}")
    check_arguments(kind, settings)


def _has_no_default(setting: Any) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING


def _rule_class(path: str) -> type[Rule]:
    """The class at ``package.module:Class``."""
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise OptionError(f"rule={path!r:.80} is not allowed: give package.module:Class")
    try:
        with _current_directory_importable():
            names = vars(import_module(module))
    except Exception as error:  # whatever a user's file raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OptionError(
            f"rule={path!r}: {module} cannot be imported ({reason}); give a module that is installed, or start in the "
            "directory that it is in"
        ) from error
    rules = {key: each for key, each in names.items() if _is_rule(each)}
    if name not in rules:
        raise OptionError(
            f"rule={path!r}: {name} is no rule of {module}{closest(name, rules)}; give a class derived from "
            "weightlora.selection.rules.base.Rule that has score()"
        )
    return rules[name]


def _is_rule(found: object) -> TypeGuard[type[Rule]]:
    from weightlora.selection.rules.base import Rule

    return isinstance(found, type) and issubclass(found, Rule) and not isabstract(found)


@contextmanager
def _current_directory_importable() -> Generator[None]:
    """Look for modules in the current directory first, as ``python -m`` does and an installed command does not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
