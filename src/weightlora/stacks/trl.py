"""TRL: options of its command line, or Python code where these cannot express the plan."""

from __future__ import annotations

import re
from typing import Any

from weightlora.stacks.base import Fields, Stack, Written, as_yaml
from weightlora.stacks.peft import python_config


def _write(fields: Fields) -> Written:
    reason = _COMMAND_LINE.lacking_option(fields)
    if reason is None:
        return _command_line(fields)
    use = f"TRL's command line {reason}. In Python: SFTTrainer(..., peft_config=peft_config)"
    return Written("trl.py", python_config(fields, use))


def _command_line(fields: Fields) -> Written:
    options: dict[str, Any] = {"use_peft": True, **_COMMAND_LINE.renamed(fields)}
    names = options["lora_target_modules"]
    if isinstance(names, str) or len(names) == 1:  # TRL reads a list of one as a regular expression
        options["lora_target_modules"] = [names if isinstance(names, str) else re.escape(names[0])]
    return Written("trl.yaml", as_yaml("Put these lines into your configuration: trl sft --config yours.yaml", options))


_COMMAND_LINE = Stack(
    _command_line,
    options={
        "task_type": "lora_task_type",
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
        "modules_to_save": "lora_modules_to_save",
        "target_modules": "lora_target_modules",
    },
    whole_alpha=True,
    patterns=True,
)
STACK = Stack(_write)
