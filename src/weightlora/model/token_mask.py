"""Rows of a layer's activations that are tokens of the batch, not padding or something else.

Legend of the shapes: b rows of the batch, s tokens a row, d features, n counted tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class TokenRows:
    """Selects the counted rows of an activation in the current forward pass."""

    masks: list[Tensor] = field(default_factory=list[Tensor])  # (b, s), true where a token counts

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows of ``x`` that count, (n, d).

        An activation of three dimensions that fits none of the batch's masks has no tokens, and none counts: DeBERTa
        calls its query and key projections a second time on positions.
        """
        flat = x.flatten(0, -2)
        for mask in self.masks:
            if x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return flat[mask.flatten()]
        return flat[:0] if self.masks and x.ndim > 2 else flat


@contextmanager
def counted_tokens(model: nn.Module, *, labelled: bool = False) -> Generator[TokenRows]:
    """Yield a function that selects the tokens among a layer's rows, while ``model`` runs inside the block.

    Tokens of ``attention_mask`` count, and in an encoder–decoder those of the target with a label. Without a mask all
    rows count. Source and target are distinguished by their lengths; if these are equal, the source's mask is used for
    both.

    Args:
        model: Called with keyword arguments, as trainers do.
        labelled: Only a decoder's tokens with a label count.

    Example:
        >>> import torch
        >>> class Net(nn.Linear):
        ...     def forward(self, x, attention_mask):
        ...         return super().forward(x)
        >>> net, x = Net(2, 2), torch.ones(1, 3, 2)
        >>> with counted_tokens(net) as rows:
        ...     _ = net(x, attention_mask=torch.tensor([[1, 1, 0]]))
        >>> rows(x).shape, rows(torch.ones(1, 7, 2)).shape
        (torch.Size([2, 2]), torch.Size([0, 2]))
    """
    rows = TokenRows()
    config: Any = vars(model).get("config")
    two_texts = bool(getattr(config, "is_encoder_decoder", False))

    def watch(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        rows.masks = _masks(given, labelled=labelled, two_texts=two_texts)

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def _masks(given: Mapping[str, Any], *, labelled: bool, two_texts: bool) -> list[Tensor]:
    mask, labels = given.get("attention_mask"), given.get("labels")
    masks: list[Tensor] = [mask.bool()] if isinstance(mask, Tensor) and mask.ndim == 2 else []
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return masks
    known = labels != -100
    if two_texts:
        return [*masks, known]
    if not labelled:
        return masks
    return [masks[0] & known if masks and masks[0].shape == known.shape else known]
