"""Greedy answers of a language model, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Return the likeliest continuation of each prompt, token by token, without special tokens.

    Args:
        model: A language model, with or without adapters.
        tokenizer: Its tokenizer; it must have a padding token.
        prompts: Their tokens.
        batch_size: Prompts a batch. Prompts are sorted by length and padded on the left.
        max_new_tokens: The most tokens of an answer.
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    order = sorted(
        range(len(prompts)), key=lambda i: -len(prompts[i])
    )  # the largest first: out of memory at once or never
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=None):
            some = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [list(prompts[i]) for i in some]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            with torch.no_grad():
                ids = model.generate(**batch, generation_config=greedy, use_cache=True)
            texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(some, texts, strict=True):
                answers[i] = str(text)
    finally:
        model.train(training)
    return answers


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, which training uses, and the base model's own."""
    known: Any = model.generation_config.eos_token_id
    own: Any = tokenizer.eos_token_id
    return sorted({own, *(known if isinstance(known, list) else [known])} - {None})
