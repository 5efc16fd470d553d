"""ms-swift: its YAML; an adapter directory for unequal ranks and whatever else it has no option for."""

from __future__ import annotations

from weightlora.stacks.base import Fields, Stack, Written, as_yaml

_USE = "Put these lines into your configuration: swift sft yours.yaml"


def _write(fields: Fields) -> Written:
    options = {"tuner_type": "lora", **STACK.renamed(fields)}
    if isinstance(options["target_modules"], str):
        options["target_regex"] = options.pop("target_modules")
    return Written("swift.yaml", as_yaml(_USE, options))


def _continue(adapter: str) -> Written:
    return Written("swift.yaml", as_yaml(_USE, {"tuner_type": "lora", "adapters": [adapter]}))


STACK = Stack(
    _write,
    options={
        "r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
        "modules_to_save": "modules_to_save",
        "target_modules": "target_modules",
        "task_type": "",  # by the options of the model
    },
    patterns=True,
    continuation=_continue,
)
