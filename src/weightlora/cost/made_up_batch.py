"""The loss of a batch of made-up tokens, for each of PEFT's task types."""

from __future__ import annotations

from typing import Any

import torch

from weightlora.cost.estimate import MakeLoss
from weightlora.errors import OptionError


def make_loss_of(task: str, length: int, device: Any) -> MakeLoss:
    """Return ``make_loss(model, rows)`` for full rows of ``length`` tokens.

    Args:
        task: PEFT's task type, which decides the labels: one for each row, one for each token, or a span.
        length: Tokens of a row.
        device: Of the batch.
    """

    def make_loss(model: Any, rows: int) -> Any:
        """The loss of so many rows."""
        tokens = torch.ones((rows, length), dtype=torch.long, device=device)
        labels = {"start_positions": tokens[:, 0], "end_positions": tokens[:, 0]}
        if task != "QUESTION_ANS":
            labels = {"labels": tokens[:, 0] if task == "SEQ_CLS" else tokens}
        return model(input_ids=tokens, **labels).loss

    return make_loss


def require_length(config: Any, length: int) -> None:
    """Raise if rows are longer than the model reads.

    Raises:
        OptionError: They are.
    """
    most = getattr(config, "max_position_embeddings", length)
    if length > most:
        raise OptionError(f"--batch has rows of {length} tokens, but the model reads {most} at most")
