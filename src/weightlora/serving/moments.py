"""What the inputs of an adapter's sites are: second moments of what A makes of them, from a few batches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightlora.errors import SelectionError
from weightlora.model.gathering import device_of
from weightlora.model.layers import lora_layers
from weightlora.model.restore import evaluated
from weightlora.selection.batches import counted_tokens, to_device

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def adapter_moments(model: PeftModel, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return E[(A·x)(A·x)ᵀ] of the inputs x of each site, (r, r) in float64, by the site's name.

    Only A's outputs are read, so that this costs forward passes and r² numbers a site. Padding does not count. The
    model is as before afterwards.

    Args:
        model: The base model with the adapter, ``PeftModel.from_pretrained(base, folder)``.
        batches: Dicts that the model is called with, such as the batches of the training.

    Raises:
        SelectionError: There is no batch.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["layer"]))
        >>> a = model.base_model.model.layer.lora_A["default"].weight
        >>> _ = torch.nn.init.ones_(a)
        >>> adapter_moments(model, [{"x": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}])
        {'layer': tensor([[5.]], dtype=torch.float64)}
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(lora_layers(model), 0)
    handles: list[Any] = []
    with evaluated(model), counted_tokens(model) as rows:

        def add(name: str, _module: Any, _inputs: Any, output: Tensor) -> None:
            seen = rows(output).double()
            sums[name] = sums.get(name, 0.0) + seen.T @ seen
            counts[name] += len(seen)

        layers: dict[str, Any] = dict(lora_layers(model))
        try:
            for name, layer in layers.items():
                handles.append(layer.lora_A["default"].register_forward_hook(partial(add, name)))
            for batch in batches:
                model(**to_device(batch, device_of(model)))
        finally:
            for handle in handles:
                handle.remove()
    if not sums:
        raise SelectionError("batches is empty; give at least one batch")
    return {name: (total / max(counts[name], 1)).cpu() for name, total in sums.items()}
