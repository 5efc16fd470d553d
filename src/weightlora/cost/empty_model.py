"""A model without weights, from its config alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from peft import prepare_model_for_kbit_training

from weightlora.cost.quantised import quantise
from weightlora.errors import DataError
from weightlora.model.loaders import LOADERS
from weightlora.model.sites import TASK_HEADS


def make_empty_model(
    config: Any, task: str, *, dtype: torch.dtype | None = None, bits: Literal[4, 8] | None = None, double: bool = False
) -> Any:
    """Return a model on the meta device, as ``weightlora train`` would prepare it.

    Args:
        config: Of transformers. A classifier's padding token is set where it has none.
        task: PEFT's task type, one of :data:`weightlora.model.loaders.LOADERS`.
        dtype: Of the weights; None is the config's, else float32.
        bits: Quantise the linear layers, but for heads.
        double: See :func:`weightlora.cost.quantised.quantise`.

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
