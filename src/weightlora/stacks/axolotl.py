"""Axolotl: its YAML; an adapter directory where an alpha is no whole number."""

from __future__ import annotations

from weightlora.stacks.base import Fields, Stack, Written, as_yaml

_USE = "Put these lines into your configuration: axolotl train yours.yaml"


def _write(fields: Fields) -> Written:
    options = {"adapter": "lora", **STACK.renamed(fields), "lora_target_linear": False}
    return Written("axolotl.yaml", as_yaml(_USE, options))


def _continue(adapter: str) -> Written:
    return Written("axolotl.yaml", as_yaml(_USE, {"adapter": "lora", "lora_model_dir": adapter}))


STACK = Stack(
    _write,
    options={
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "peft_use_rslora",
        "use_dora": "peft_use_dora",
        "fan_in_fan_out": "lora_fan_in_fan_out",
        "modules_to_save": "lora_modules_to_save",
        "target_modules": "lora_target_modules",
        "rank_pattern": "lora_rank_pattern",
        "alpha_pattern": "lora_alpha_pattern",
        "task_type": "",  # by the class of the model
    },
    whole_alpha=True,
    patterns=True,
    continuation=_continue,
)
