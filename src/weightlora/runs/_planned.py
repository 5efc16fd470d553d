"""A recipe with ``plan``: what the plan decides is its own, and an option that says something else is a mistake."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.methods import METHODS
from weightlora.plan.limits import LIMITS, read_limits
from weightlora.plan.plan import AdapterPlan
from weightlora.runs.recipe import MethodOptions, Recipe
from weightlora.selection.rules import RULES, rule_of, settings_of
from weightlora.selection.steps import check_steps
from weightlora.validation import read_pairs

if TYPE_CHECKING:
    from torch import nn

#: Options that act on the training of a plan; the plan decides the others of a method.
_FREE = (
    *("plan", "head_learning_rate", "fast", "grow_batch", "lora_target_modules"),
    *("store_frozen", "store_limit", "store_dropout", "store_offload"),
)


def with_plan(recipe: Recipe) -> Recipe:
    """Return the recipe with the values of its plan; one without a plan is returned as it is.

    Raises:
        OptionError: An option that was given has another value than the plan.
        PlanError: The plan cannot be read.
    """
    options = recipe.method
    if options.plan is None:
        return recipe
    plan = AdapterPlan.load(options.plan)
    named = (options.rule or "") if "rule" in recipe.given else ""
    there, now = _planned(plan, named), _asked(options, recipe.given, plan)
    pairs = read_pairs("method_options", options.method_options)
    now |= pairs
    changed = [k for k in now if (k in there or k in pairs) and json.dumps(there.get(k)) != json.dumps(now[k])]
    if changed:
        faults = "; ".join(f"{name}={there.get(name)!r:.60} there, {now[name]!r:.60} now" for name in changed)
        raise OptionError(
            f"{options.plan} decides the adapters, and was made with other options ({faults}); leave these out, or "
            "leave plan out to select anew"
        )
    own = {name: there.get(name) for name in _names() if name in there or name not in recipe.given}
    own |= {name: str(own[name]) for name in (*LIMITS, "steps") if own.get(name) is not None}
    own |= {name: [] for name in ("rule_options", "method_options") if own.get(name, []) is None}
    # Several ranks, or an alpha that is not whole, have no option.
    own |= {name: None for name in ("lora_r", "lora_alpha") if name in own and type(own[name]) is not int}
    known = {name: value for name, value in own.items() if value is not None}
    return replace(recipe, method=replace(options, **known), settings={**recipe.settings, **own})


def require_candidates(options: MethodOptions, plan: AdapterPlan, model: nn.Module) -> None:
    """Raise where ``lora_target_modules`` names other candidates than the plan has.

    Args:
        options: The recipe's.
        plan: Its plan.
        model: With LoRA on what the options name.

    Raises:
        OptionError: It does.
    """
    from weightlora.model.layers import lora_layers

    named, planned = set(lora_layers(model)), set(plan.ranks)
    if options.lora_target_modules and named != planned:
        one = min(named ^ planned)
        raise OptionError(
            f"lora_target_modules={options.lora_target_modules} are not the candidates of {options.plan}, {one} among "
            f"the {len(named ^ planned)} that differ; leave lora_target_modules out, or leave plan out to select anew"
        )


def _names() -> list[str]:
    return [each.name for each in dataclasses.fields(MethodOptions) if each.name not in _FREE]


def _planned(plan: AdapterPlan, named: str) -> dict[str, Any]:
    """What the plan was made with, as far as it records it: by option, or by setting of its rule.

    A rule of the user's own is imported only where the recipe names it: a plan may come from elsewhere.
    """
    ranks, alphas = {entry.lora_r for entry in plan.entries}, {entry.lora_alpha for entry in plan.entries}
    made: dict[str, Any] = {
        **plan.options,
        "seed": plan.seed,
        "lora_r": ranks.pop() if len(ranks) == 1 else sorted(ranks),
        "lora_alpha": alphas.pop() if len(alphas) == 1 else sorted(alphas),
        "lora_dropout": float(plan.lora.get("lora_dropout", 0.0)),
        "lora_modules_to_save": list(plan.lora.get("modules_to_save", [])),
        "use_rslora": bool(plan.lora.get("use_rslora", False)),
        "use_dora": bool(plan.lora.get("use_dora", False)),
    }
    if _is_ours(plan) or ":" in plan.rule:
        default = settings_of(rule_of(plan.rule)) if _is_ours(plan) or plan.rule == named else {}
        own = [name for name in default if plan.options.get(name, default[name]) != default[name]]
        made |= {"rule": plan.rule, "ranking": plan.options.get("ranking", "score")}
        made |= {"method": _method_of(plan)}
        made |= {"rule_options": [f"{name}={plan.options[name]}" for name in own]}
        made |= {"warm_start": plan.options.get("warm_start", False), "budget": plan.options.get("expand", "ranks")}
    elif any(plan.rule == entry.name for entry in METHODS):
        made |= {"method": plan.rule}
    return made


def _asked(options: MethodOptions, given: frozenset[str], plan: AdapterPlan) -> dict[str, Any]:
    """The same of the options that were given."""
    asked = {name: getattr(options, name) for name in _names() if name in given}
    asked |= {name: value for name, value in read_limits(vars(options)).items() if name in given}
    asked |= {"steps": check_steps(asked["steps"])} if "steps" in given else {}
    asked |= {"lora_dropout": float(options.lora_dropout)} if "lora_dropout" in given else {}
    if {"rule", "rule_options"} & given and (_is_ours(plan) or ":" in plan.rule):
        asked |= _rule_asked(plan.rule if options.rule is None else options.rule, options.rule_options)
    return {name: value for name, value in asked.items() if name not in ("rule_options", "method_options")}


def _method_of(plan: AdapterPlan) -> str:
    if "expand" in plan.options:
        return "weightlora_plus"
    return "weightlora" if plan.options.get("begins_training") else "selected"


def _is_ours(plan: AdapterPlan) -> bool:
    """Whether the plan's rule has a line in the registry."""
    return any(plan.rule == entry.name for entry in RULES)


def _rule_asked(name: str, texts: list[str]) -> Mapping[str, Any]:
    rule = rule_of(name, **read_pairs("rule_options", texts))
    return {"rule": rule.name, **{k: v for k, v in settings_of(rule).items() if v is not None}}
