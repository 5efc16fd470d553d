"""A model without weights from its configuration, quantised if asked, and the loss of a made-up batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn

from weightlora.errors import DataError, OptionError, require_extra
from weightlora.model.sites import LOADERS, TASK_HEADS

if TYPE_CHECKING:
    from weightlora.cost.memory import MakeLoss


def make_empty_model(
    config: Any, task: str, *, dtype: torch.dtype | None = None, bits: Literal[4, 8] | None = None, double: bool = False
) -> Any:
    """Return a model on the meta device, as ``weightlora train`` would prepare it.

    Args:
        config: Of transformers. A classifier's padding token is set where it has none.
        task: PEFT's task type, one of :data:`weightlora.model.sites.LOADERS`.
        dtype: Of the weights; None is the config's, else float32.
        bits: Quantise the linear layers, but for heads.
        double: See :func:`quantise`.

    Raises:
        DataError: transformers makes no such model of the config.
        MissingPackageError: bitsandbytes is not installed.

    Example:
        >>> config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)
        >>> make_empty_model(config, "CAUSAL_LM").device
        device(type='meta')
    """
    loader: Any = getattr(transformers, LOADERS[task])
    try:
        if task == "SEQ_CLS" and config.pad_token_id is None:  # a decoder looks for the last token of a row
            config.pad_token_id = 0
        with torch.device("meta"):
            model = loader.from_config(config, dtype=dtype or config.dtype or torch.float32)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise DataError(f"cannot make {LOADERS[task]} from the config: {str(error).splitlines()[0]}") from error
    if bits is None:
        return model
    quantise(model, bits, [*TASK_HEADS.get(task, ()), "lm_head"], double=double)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def quantise(model: nn.Module, bits: Literal[4, 8], skip: Collection[str], *, double: bool = False) -> None:
    """Replace linear layers by those of bitsandbytes, in place; transformers finds them.

    In 4 bit (NF4) each 64 weights have a scale in float32; ``double`` stores the scales in 8 bit, and a scale for each
    256 of them. In 8 bit each output has a scale, and no input counts as an outlier.

    Args:
        model: On the meta device.
        bits: Of a weight.
        skip: Names, or their ends, of layers that stay whole, such as the output head.
        double: Double quantisation, ``bnb_4bit_use_double_quant`` in transformers.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    require_extra("bitsandbytes", "quantised")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    if bits == 4:
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    else:
        options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # outliers depend on the inputs' values
    replace_with_bnb_linear(model, list(skip), options)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight = _weight_4bit(module, double=double)
        elif isinstance(module, Linear8bitLt):
            module.weight = _weight_8bit(module)


def _weight_4bit(layer: Any, *, double: bool) -> Any:
    """The packed weight with its scales; made by hand, because bitsandbytes would keep levels on the meta device."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    make_state: Any = QuantState
    make: Any = Params4bit
    numbers = layer.out_features * layer.in_features
    with torch.device("meta"):
        scales = torch.empty(-(-numbers // 64), dtype=torch.uint8 if double else torch.float32)
        outer: dict[str, Any] = {}
        if double:
            of_scales = torch.empty(-(-scales.numel() // 256))
            outer["offset"] = torch.empty(())
            outer["state2"] = make_state(of_scales, code=torch.empty(256), blocksize=256, dtype=torch.float32)
        state = make_state(
            scales,
            shape=torch.Size((layer.out_features, layer.in_features)),
            code=torch.empty(16),
            blocksize=64,
            quant_type="nf4",
            dtype=torch.float16,
            **outer,
        )
        packed = torch.empty((-(-numbers // 2), 1), dtype=torch.uint8)
    return make(packed, quant_state=state, blocksize=64, quant_type="nf4", bnb_quantized=True, module=layer)


def _weight_8bit(layer: Any) -> Any:
    from bitsandbytes.nn import Int8Params

    make: Any = Int8Params
    weights = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8, device="meta")
    return make(weights, requires_grad=False, CB=weights, SCB=torch.empty(layer.out_features, device="meta"))


def quantisation_tensors(parameter: Tensor) -> Iterator[Tensor]:
    """The scales and levels that belong to a quantised parameter; others have none. Read them before a forward pass."""
    attributes = vars(parameter)
    state: Any = attributes.get("quant_state")
    while state is not None:
        yield from (value for value in (state.absmax, state.code, state.offset) if isinstance(value, Tensor))
        state = state.state2
    if isinstance(attributes.get("SCB"), Tensor):
        yield attributes["SCB"]


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
