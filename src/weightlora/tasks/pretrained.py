"""Models and tokenizers by name or folder; the weights of a new head depend on a seed only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, require_extra
from weightlora.tasks.embedded import copy_hint, hub_name

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_pretrained(auto_class: str, path: str | Path, *, seed: int, **options: Any) -> PreTrainedModel:
    """Return a pretrained model; weights that its files lack, such as a new head, are drawn from ``seed``.

    Args:
        auto_class: Name of transformers' loader, such as ``"AutoModelForCausalLM"``.
        path: A folder or a hub name.
        seed: The global generators are left as they were.
        options: Passed to ``from_pretrained``: ``dtype``, ``quantization_config``, ``num_labels``, ...

    Raises:
        DataError: There is no such model, it has no such head, or a package that it needs is missing.
        MissingPackageError: ``gguf_file`` is given and the package ``gguf`` is not installed.
    """
    import torch
    import transformers

    if options.get("gguf_file") is not None:
        require_extra("gguf", "llm")
        # Plain weights, whatever kernels are installed: transformers' Trainer does not train GGUF's own blocks.
        options.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    embedded = hub_name(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = getattr(transformers, auto_class).from_pretrained(str(path), **options)
        except (ImportError, OSError, ValueError) as error:
            raise DataError(
                f"cannot load {auto_class} from {path}: {str(error).splitlines()[0]}{copy_hint(path)}"
            ) from error
    if embedded is not None:
        # The name that plans and adapters are saved with. ``model.name_or_path`` stays the folder, where PEFT looks for
        # the configuration when it saves; by the name it would ask the hub.
        model.config.name_or_path = embedded
    return model


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; one without a padding token pads with the end of the text.

    Args:
        path: A folder or a hub name.
        options: Passed to ``from_pretrained``, such as ``gguf_file``.

    Raises:
        DataError: There is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load a tokenizer from {path}: {str(error).splitlines()[0]}{copy_hint(path)}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
