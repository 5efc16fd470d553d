"""Plain text for a language model: tokens and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(path: str | Path) -> PreTrainedModel:
    """Load a language model from a folder or a hub name.

    Raises:
        DataError: There is no such model.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load a language model from {path}: {str(error).splitlines()[0]}") from error


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int) -> list[dict[str, Any]]:
    """Return one dict of token ids, mask and labels a text, cut off at ``max_length``; each token is predicted."""
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)
    pairs = zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids, mask in pairs]
