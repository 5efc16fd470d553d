"""Plain text for a language model: tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int) -> list[dict[str, Any]]:
    """Return one dict of token ids, mask and labels a text, cut off at ``max_length``; each token is predicted."""
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)
    pairs = zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids, mask in pairs]
