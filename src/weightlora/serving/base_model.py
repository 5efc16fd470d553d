"""The linear layers of an adapter's base model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError
from weightlora.model.sites import find_sites
from weightlora.tasks.embedded import embedded_model

if TYPE_CHECKING:
    from weightlora.model.sites import Site

#: transformers' loader by PEFT's task type.
_LOADERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def is_here(name: str) -> bool:
    """Whether a base model can be read without asking a hub: a folder with a configuration, or an embedded model.

    Example:
        >>> is_here("meta-llama/Llama-3.1-8B"), is_here("")
        (False, False)
    """
    return name.startswith("embedded/") or (Path(name) / "config.json").is_file()


def linear_layers(name: str, task_type: str | None) -> dict[str, Site]:
    """Return the linear layers of a base model by name; its weights are neither read nor made.

    Args:
        name: A folder with ``config.json``, a hub name, or ``embedded/smollm2``.
        task_type: PEFT's, which decides the class of the model; None stands for a causal language model.

    Raises:
        DataError: There is no such configuration, or no such model can be made of it.
    """
    import torch
    import transformers
    from peft import LoraConfig

    folder, gguf = embedded_model(name) or (name, None)
    loader: Any = getattr(transformers, _LOADERS.get(str(task_type), "AutoModelForCausalLM"))
    extra: Mapping[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **extra)
        with torch.device("meta"):
            model = loader.from_config(config)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the base model {name}: {str(error).splitlines()[0]}; give --base") from error
    return {site.name: site for site in find_sites(model, LoraConfig(target_modules="all-linear")).sites}
