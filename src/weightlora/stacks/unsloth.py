"""Unsloth: a call of ``get_peft_model`` in Python, which gives further arguments to PEFT's ``LoraConfig``."""

from __future__ import annotations

from weightlora.stacks.base import Fields, Stack, Written, as_arguments


def _write(fields: Fields) -> Written:
    own = {name: value for name, value in fields.items() if name != "task_type"}  # by the class of the model
    call = f"model = FastLanguageModel.get_peft_model(\n    model,\n{as_arguments(own)})\n"
    use = "# model, tokenizer = FastLanguageModel.from_pretrained(yours)"
    return Written("unsloth.py", f"from unsloth import FastLanguageModel\n\n{use}\n{call}")


STACK = Stack(_write)
