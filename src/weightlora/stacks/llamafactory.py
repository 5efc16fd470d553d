"""LLaMA-Factory: its YAML; an adapter directory for unequal ranks and whatever else it has no option for."""

from __future__ import annotations

from weightlora.plan.plan import AdapterPlan
from weightlora.stacks.base import Fields, Stack, Written, as_yaml

_USE = "Put these lines into your configuration: llamafactory-cli train yours.yaml"


def _limits(plan: AdapterPlan) -> str | None:
    if plan.lora.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        return f"trains with task_type='CAUSAL_LM', and the plan has {plan.lora['task_type']!r:.40}"
    dropped = [entry.site.name for entry in plan.entries if entry.r == 0]
    inside = [name for name in plan.names if any(name in other for other in dropped)]
    if inside:  # in a model with a vision tower, a name is matched anywhere in another
        return f"reads names as parts of names, and {inside[0]} is a part of one that the plan does not keep"
    return None


def _write(fields: Fields) -> Written:
    options = {"finetuning_type": "lora", **STACK.renamed(fields)}
    joined = {name: ",".join(value) for name, value in options.items() if isinstance(value, list)}
    return Written("llamafactory.yaml", as_yaml(_USE, {**options, **joined}))


def _continue(adapter: str) -> Written:
    options = {"finetuning_type": "lora", "adapter_name_or_path": adapter, "create_new_adapter": False}
    return Written("llamafactory.yaml", as_yaml(_USE, options))


STACK = Stack(
    _write,
    options={
        "r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
        "modules_to_save": "additional_target",
        "target_modules": "lora_target",
        "task_type": "",  # always CAUSAL_LM
    },
    whole_alpha=True,
    limits=_limits,
    continuation=_continue,
)
