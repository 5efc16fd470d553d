"""What a stack's file says, and what all of them share: the fields of a ``LoraConfig``, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan

Fields = Mapping[str, Any]
"""Arguments of PEFT's ``LoraConfig`` by name, as JSON: those of the plan, and the user's own."""


@dataclass(frozen=True)
class Written:
    """A small file in a stack's own format."""

    file: str
    """Its name."""
    text: str


@dataclass(frozen=True)
class Stack:
    """How plans are written for a training stack."""

    write: Callable[[Fields], Written]
    """The configuration of a plan of which nothing is lacking."""
    options: Mapping[str, str] | None = None
    """Its options by the field, in the order of the file; an empty text where it sets the field by itself. None: it
    takes every field."""
    whole_alpha: bool = False
    """Whether its ``lora_alpha`` is a whole number."""
    patterns: bool = False
    """Whether ``target_modules`` may be a regular expression."""
    limits: Callable[[AdapterPlan], str | None] | None = None
    """What else it cannot express, as the end of a sentence that begins with its name; None where it can."""
    continuation: Callable[[str], Written] | None = None
    """The configuration that continues from an adapter directory; None where the stack cannot."""

    def lacking(self, plan: AdapterPlan, fields: Fields) -> str | None:
        """Return what it cannot express of a plan, as the end of a sentence that begins with its name, or None.

        Args:
            plan: The plan.
            fields: Its fields, by :func:`planned_fields`.
        """
        return (self.limits(plan) if self.limits else None) or self.lacking_option(fields)

    def lacking_option(self, fields: Fields) -> str | None:
        """Return what it has no option for, or None."""
        if self.options is None:
            return None
        for name, word in (("rank_pattern", "rank"), ("alpha_pattern", "lora_alpha")):
            if name in fields and name not in self.options:
                values = fields[name].values()
                return f"has one {word} for all adapters, and the plan has {min(values):g} to {max(values):g}"
        alphas = (fields["lora_alpha"], *fields.get("alpha_pattern", {}).values())
        if self.whole_alpha and any(alpha != int(alpha) for alpha in alphas):
            return f"reads whole numbers as lora_alpha, and the plan has {next(a for a in alphas if a != int(a)):g}"
        if isinstance(fields["target_modules"], str) and not self.patterns:
            return "reads names as endings, and those of the plan are also endings of sites that it does not keep"
        others = [f"{name}={value!r:.40}" for name, value in fields.items() if name not in self.options]
        return f"has no option for {', '.join(others)}" if others else None

    def renamed(self, fields: Fields) -> dict[str, Any]:
        """Return its options, each with the value of its field where the plan has one; the dropout is always there."""
        own, values = self.options or {}, {"lora_dropout": 0.0, **fields}
        return {option: values[name] for name, option in own.items() if option and name in values}


#: Fields that choose sites, which a plan has already done.
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def planned_fields(plan: AdapterPlan) -> dict[str, Any]:
    """Return the arguments of ``LoraConfig`` that give exactly the planned adapters, as JSON.

    ``target_modules`` is the sorted list of full names, or a regular expression of them where PEFT, which reads listed
    names as endings, would match other modules too.

    Raises:
        PlanError: The plan keeps no site, or this PEFT does not take its fields.
    """
    config = plan.to_lora_config()
    ambiguous = bool(config.exclude_modules) or config.layers_to_transform is not None
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": "|".join(map(re.escape, plan.names)) if ambiguous else list(plan.names),
        **{name: pattern for name, pattern in patterns.items() if pattern},
        **{name: value for name, value in plan.lora.items() if name not in _CHOOSING},
    }


def as_yaml(use: str, options: Mapping[str, Any]) -> str:
    """Return ``options`` as lines of YAML below a comment that says how they are used."""
    return f"# {use}\n" + yaml.safe_dump(dict(options), sort_keys=False, width=10**6)


def as_arguments(fields: Fields) -> str:
    """Return ``fields`` as arguments of a Python call, one a line, and the names in lists and dictionaries too.

    Example:
        >>> print(as_arguments({"r": 8, "target_modules": ["a.q", "a.v"]}), end="")
            r=8,
            target_modules=[
                'a.q',
                'a.v',
            ],
    """
    lines: list[str] = []
    for name, value in fields.items():
        if isinstance(value, list):
            items, (start, end) = [repr(item) for item in value], "[]"
        elif isinstance(value, Mapping):
            items, (start, end) = [f"{key!r}: {item!r}" for key, item in value.items()], "{}"
        else:
            lines.append(f"    {name}={value!r},\n")
            continue
        lines += [f"    {name}={start}\n", *(f"        {item},\n" for item in items), f"    {end},\n"]
    return "".join(lines)
