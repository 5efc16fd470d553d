"""PEFT: a ``LoraConfig`` in Python."""

from __future__ import annotations

from weightlora.stacks.base import Fields, Stack, Written, as_arguments


def python_config(fields: Fields, use: str) -> str:
    """Return Python code that makes the planned ``peft_config``; ``use`` is a comment."""
    return f"# {use}\nfrom peft import LoraConfig\n\npeft_config = LoraConfig(\n{as_arguments(fields)})\n"


def _write(fields: Fields) -> Written:
    return Written("peft.py", python_config(fields, "Use: model = peft.get_peft_model(model, peft_config)"))


STACK = Stack(_write)
