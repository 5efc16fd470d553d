"""Rules that score the sites, one file each; a new one is a file and a line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.options import check_types
from weightlora.text import closest

if TYPE_CHECKING:
    from weightlora.selection.rules.base import Rule


@dataclass(frozen=True)
class RuleEntry:
    """A line of the registry: a name that users give, and the class that it stands for."""

    name: str
    summary: str
    file: str
    rule: str
    """Name of the class in ``weightlora.selection.rules.<file>``."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the name sets, where it is not the class's default."""


#: Every rule that ``select`` and ``--rule`` take by name.
RULES = (
    RuleEntry("first_order", "size of B's mean gradient at B = 0", "first_order", "FirstOrder"),
    RuleEntry("pursuit", "the same, a few sites at a time, after those before were trained", "pursuit", "Pursuit"),
    RuleEntry("integrated", "share of the loss that a short LoRA training saved", "integrated", "Integrated"),
    RuleEntry("integrated_ranks", "the same of every single rank", "integrated", "Integrated", {"per": "rank"}),
    RuleEntry(
        "even_ranks",
        "the best ranks of each site, of all sites alike",
        "integrated",
        "Integrated",
        {"per": "rank", "most_ranks": "even"},
    ),
    RuleEntry("fisher", "empirical Fisher information of B at B = 0", "fisher", "Fisher"),
    RuleEntry(
        "relative_gradient",
        "gradient of the full weight, relative to the weight",
        "relative_gradient",
        "RelativeGradient",
    ),
    RuleEntry("aletheia", "whole blocks, by the gradients of their weights", "aletheia", "Aletheia"),
    RuleEntry("gora", "weight times the mean gradient of the full weight", "gora", "GoRA"),
    RuleEntry("cross_fitted", "whitened gain along directions that other batches chose", "cross_fitted", "CrossFitted"),
    RuleEntry("stoiht", "gates under a hard threshold, after a new head was trained", "stoiht", "StoIHT"),
    RuleEntry("paper", "the same without training the head first: the paper", "stoiht", "StoIHT", {"head_steps": 0}),
    RuleEntry("plop", "projections whose inputs are least aligned with their weights", "plop", "PLoP"),
    RuleEntry("kappa_tune", "inverse condition number of the frozen weight", "kappa_tune", "KappaTune"),
    RuleEntry(
        "explained_variance",
        "share of the inputs' variance in r directions",
        "explained_variance",
        "ExplainedVariance",
    ),
    RuleEntry("last_layers", "blocks nearest to the output", "heuristic", "Heuristic", {"kind": "last_layers"}),
    RuleEntry("first_layers", "blocks nearest to the input", "heuristic", "Heuristic", {"kind": "first_layers"}),
    RuleEntry("strided", "blocks spread evenly over the depth", "heuristic", "Heuristic", {"kind": "strided"}),
    RuleEntry("mlp", "projections of the MLP at random", "heuristic", "Heuristic", {"kind": "mlp"}),
    RuleEntry("attention", "projections of attention at random", "heuristic", "Heuristic", {"kind": "attention"}),
    RuleEntry("v_o_down", "value, output and down at random", "heuristic", "Heuristic", {"kind": "v_o_down"}),
    RuleEntry("stratified", "random, of every projection alike", "heuristic", "Heuristic", {"kind": "stratified"}),
)


def rule_entry(name: str) -> RuleEntry:
    """Return the registry's line of that name; the rule's file is not imported.

    Raises:
        OptionError: There is none; the text names the closest.
    """
    known = {entry.name: entry for entry in RULES}
    if name not in known:
        raise OptionError(f"rule={name!r} is not allowed{closest(name, known)}: give one of {', '.join(known)}")
    return known[name]


def rule_of(rule: str | Rule, **settings: Any) -> Rule:
    """Return the rule of that name, or the given rule, with ``settings`` changed.

    Args:
        rule: One of :data:`RULES`, or a rule object.
        settings: Fields of the rule, such as ``gate_lr``.

    Raises:
        OptionError: There is no such rule or setting, or a value is out of its range.

    Example:
        >>> rule_of("paper", gate_lr=1.0)
        StoIHT(gate_lr=1.0, threshold_every=1, threshold='magnitude', head_steps=0)
    """
    if isinstance(rule, str):
        entry = rule_entry(rule)
        made: Rule = getattr(import_module(f"weightlora.selection.rules.{entry.file}"), entry.rule)(**entry.settings)
    elif dataclasses.is_dataclass(rule):
        made = rule
    else:
        names = ", ".join(entry.name for entry in RULES)
        raise OptionError(f"rule={rule!r:.80} is not allowed: give a rule or one of {names}")
    fields = [f.name for f in dataclasses.fields(made)]
    for name in settings:
        if name not in fields:
            raise OptionError(
                f"rule {made.name} has no setting {name!r}{closest(name, fields)}; it has {', '.join(fields) or 'none'}"
            )
    check_types({f.name: f.type for f in dataclasses.fields(made)}, settings)
    return dataclasses.replace(made, **settings)


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
            f"warm_start=True: rule={rule.name!r} trains no adapters in its warm-up; give one of {', '.join(others)}, "
            "or leave warm_start out"
        )


def settings_of(rule: Rule) -> dict[str, Any]:
    """Return the rule's settings by name, as a plan records them."""
    return dataclasses.asdict(rule)
