"""4-bit weights of a model on the meta device, as bitsandbytes stores them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.errors import require_extra


def quantise_4bit(model: nn.Module, skip: Collection[str], *, double: bool = False) -> None:
    """Replace linear layers by bitsandbytes' NF4 layers, in place; transformers' rule finds the layers.

    A block of 64 weights has a scale in float32; ``double`` stores the scales in 8 bits, with a scale for each 256.

    Args:
        model: On the meta device.
        skip: Names, or their ends, of layers that stay whole, such as the output head.
        double: Double quantisation, ``bnb_4bit_use_double_quant`` in transformers.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    require_extra("bitsandbytes", "quantised")
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    replace_with_bnb_linear(model, list(skip), options)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            packed, state = bitsandbytes.functional.quantize_4bit(
                torch.empty(module.out_features, module.in_features, dtype=torch.float16, device="meta"),
                blocksize=64,
                compress_statistics=double,
                quant_type="nf4",
            )
            module.weight = bitsandbytes.nn.Params4bit(
                packed, quant_state=state, blocksize=64, quant_type="nf4", bnb_quantized=True, module=module
            )


def quantisation_tensors(parameter: Tensor) -> Iterator[Tensor]:
    """The tensors that belong to a 4-bit parameter: scales and levels. Others have none."""
    state: Any = vars(parameter).get("quant_state")
    while state is not None:
        yield from (value for value in (state.absmax, state.code, state.offset) if isinstance(value, Tensor))
        state = state.state2
