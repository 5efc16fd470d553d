"""Which rows of a layer's activations are tokens of the batch, and not padding or something else.

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
    """Picks the counted rows out of an activation of the forward pass that is running."""

    masks: list[Tensor] = field(default_factory=list[Tensor])  # (b, s), true where a token counts

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows of ``x`` that count, (n, d).

        Where the batch has masks and none fits an activation of three dimensions, its rows are no tokens of the
        batch, and none counts: DeBERTa's query and key projections are called a second time on positions.
        """
        flat = x.flatten(0, -2)
        for mask in self.masks:
            if x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return flat[mask.flatten()]
        return flat[:0] if self.masks and x.ndim > 2 else flat


@contextmanager
def counted_tokens(model: nn.Module, *, labelled: bool = False) -> Generator[TokenRows]:
    """Watch what ``model`` is called with, for the length of the block, and know which tokens count.

    Those of ``attention_mask`` do; in an encoder–decoder those of the target with a label do as well. Where there is
    no mask all rows count. Source and target are told apart by their lengths: where these are equal, the source's
    mask serves for both.

    Args:
        model: Called with keyword arguments, as trainers do.
        labelled: Of a decoder's tokens only those with a label count.

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
