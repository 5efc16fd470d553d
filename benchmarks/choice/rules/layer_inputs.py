"""The tokens among the inputs of every site's frozen layer, while the model runs forward."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from weightlora.model.restore import evaluated
from weightlora.model.token_mask import TokenRows, counted_tokens
from weightlora.model.torch_private import Observer
from weightlora.selection.stage import Stage


@contextmanager
def layer_inputs(stage: Stage, take: Callable[[str, Tensor], None]) -> Generator[None]:
    """Give the inputs of each site's frozen layer to ``take(site, tokens)`` while the model runs inside the block.

    ``tokens`` has the shape (tokens, in). Padding is left out where the model gets an ``attention_mask``. Dropout is
    off. The adapters are off, too: with B = 0 they would add nothing but time.

    Args:
        stage: The model while it is scored, before anything is trained.
        take: Called once for each call of a layer that has any token, before the layer runs. It must not change them.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from weightlora.model.sites import find_sites
        >>> from weightlora.selection.stage import probed
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> loss = lambda model, batch: model(batch["x"]).sum()
        >>> batches, sites = [{"x": torch.ones(2, 5, 4)}], find_sites(net).sites
        >>> with probed(net, LoraConfig(r=2), sites, batches=batches, steps=1, seed=0, loss_fn=loss) as stage:
        ...     with layer_inputs(stage, lambda site, tokens: print(site, tuple(tokens.shape))):
        ...         stage.forward("scoring", 1)
        0 (10, 4)
    """
    layers: list[Any] = list(stage.layers.values())
    with evaluated(stage.model), counted_tokens(stage.model) as rows, ExitStack() as hooks:
        for layer in layers:
            layer.enable_adapters(False)
        for name, layer in stage.layers.items():
            base: nn.Module = layer.get_base_layer()
            hook = base.register_forward_pre_hook(_Inputs(_ignore, partial(take, name), rows))
            hooks.callback(hook.remove)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


@dataclass(frozen=True)
class _Inputs(Observer):
    """A forward pre-hook that hands on the tokens; an :class:`Observer`, since it leaves the input as it is."""

    take: Callable[[Tensor], None]
    rows: TokenRows

    def __call__(self, *given: Any) -> None:
        """Hand on the tokens of one call of the layer."""
        _layer, inputs = given
        tokens = self.rows(inputs[0].detach())
        if len(tokens):
            self.take(tokens)


def _ignore() -> None:
    """Do nothing: the tokens say that the hook ran."""
