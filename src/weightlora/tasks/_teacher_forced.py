"""Loss and exact match of given answers in one forward pass per batch, instead of an answer generated token by token.

Every token of an answer is predicted from the true tokens before it. All of them are predicted right exactly where
greedy decoding writes that answer: up to the first wrong token both see the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Answered:
    """What the model says to the answers of a split."""

    loss: float
    """Mean −log p over all tokens of all answers, in nats."""
    exact_match: float
    """Share of rows whose answer would be written by greedy decoding, in [0, 1]."""


#: What PyTorch's cross entropy leaves out.
_NO_LABEL = -100


@torch.no_grad()
def answered(
    model: Any, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, ends: Sequence[int], batch_size: int
) -> Answered:
    """Return loss and exact match of the answers.

    Args:
        model: A language model, with or without adapters; its mode is kept.
        ids: The tokens of each row: a prompt, and the answer with its end.
        labels: The same tokens where they belong to the answer, else -100.
        ends: Tokens that end an answer; what comes after the first one is no part of the exact match.
        batch_size: Rows a batch. Rows are sorted by length and padded on the right.
    """
    from tqdm import tqdm

    losses = torch.zeros((), dtype=torch.float64)
    right = tokens = 0
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the largest first: out of memory at once or never
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=None):
            some = order[start : start + batch_size]
            width = len(ids[some[0]])
            tokens_in = torch.tensor([[*ids[i], *[0] * (width - len(ids[i]))] for i in some], device=model.device)
            attended = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in some])
            answer = torch.tensor([[*labels[i], *[_NO_LABEL] * (width - len(labels[i]))] for i in some]) != _NO_LABEL
            first = int(answer.any(0).int().argmax())
            logits = model(
                input_ids=tokens_in,
                attention_mask=attended.to(model.device),
                # From the token before the first answer. Given a count, transformers takes a slice, for which torch
                # 2.13 copies the output head's weight once a row: three times the time on a CPU.
                logits_to_keep=torch.arange(first - 1, width, device=model.device),
                use_cache=False,
            ).logits[:, :-1]
            wanted, counted = tokens_in[:, first:].cpu(), answer[:, first:]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens_in[:, first:].flatten(), reduction="none")
            losses += loss.cpu().view_as(counted)[counted].double().sum()
            tokens += int(counted.sum())
            judged = counted & ~_after_end(wanted, counted, ends)
            right += int(((logits.argmax(-1).cpu() == wanted) | ~judged).all(1).sum())
    finally:
        model.train(training)
    return Answered(float(losses) / tokens, right / len(ids))


def _after_end(tokens: torch.Tensor, answer: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Whether an end token of the answer came before."""
    ended = (torch.isin(tokens, torch.tensor(ends)) & answer).int()
    return ended.cumsum(1) - ended > 0
