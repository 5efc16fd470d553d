"""The layers of an adapter's base model that can have an adapter, from its configuration alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightlora.errors import DataError, WeightLoraWarning
from weightlora.model.loaders import LOADERS
from weightlora.model.sites import Site, find_sites
from weightlora.tasks.embedded import base_files


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base model without its weights; nothing, where it is not at hand."""

    layers: Mapping[str, Site] = field(default_factory=dict[str, Site])
    """Linear layers, output head and embeddings by name."""
    tied: frozenset[str] = frozenset()
    """Output head and embeddings, where they share their weights."""
    model_type: str = ""
    """As in its configuration; empty where this is not known."""
    architecture: str = ""
    """The class that transformers makes of it for the adapter's task."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Of its parameters."""


def is_here(name: str) -> bool:
    """Whether a base model can be read without asking a hub: a folder with a configuration, or an embedded model.

    Example:
        >>> is_here("meta-llama/Llama-3.1-8B"), is_here("")
        (False, False)
    """
    return base_files(name) is not None or (Path(name) / "config.json").is_file()


def read_base(name: str, task_type: str | None) -> BaseModel:
    """Return the layers of a base model; its weights are neither read nor made.

    Args:
        name: A folder with ``config.json``, a hub name, or ``embedded/smollm2``.
        task_type: PEFT's, which decides the class of the model; None stands for a causal language model.

    Raises:
        DataError: There is no such configuration, or no such model can be made of it.
    """
    import torch
    from peft import LoraConfig

    model = _empty_model(name, task_type)
    with warnings.catch_warnings():  # of layers that PEFT refuses, which nobody asked for
        warnings.simplefilter("ignore", WeightLoraWarning)
        layers = {site.name: site for site in find_sites(model, LoraConfig(target_modules="all-linear")).sites}
    ends: set[str] = set()
    for part, module in model.named_modules():
        if module is model.get_input_embeddings() and isinstance(module, torch.nn.Embedding):
            layers[part] = Site(part, module.num_embeddings, module.embedding_dim)
            ends |= {part}
        elif module is model.get_output_embeddings() and isinstance(module, torch.nn.Linear):
            layers[part] = Site(part, module.in_features, module.out_features)
            ends |= {part}
    tied = frozenset(ends if model.config.tie_word_embeddings else ())
    shapes = {part: tuple(value.shape) for part, value in model.named_parameters(remove_duplicate=False)}
    return BaseModel(layers, tied, model.config.model_type, type(model).__name__, shapes)


def write_config(name: str, task_type: str | None, folder: str | Path) -> Path:
    """Write ``config.json`` of a base model, with the class of the model, and return ``folder``.

    Raises:
        DataError: There is no such base model.
    """
    model = _empty_model(name, task_type)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return Path(folder)


def _empty_model(name: str, task_type: str | None) -> Any:
    """A base model without numbers."""
    import torch
    import transformers

    folder, gguf = base_files(name) or (name, None)
    loader: Any = getattr(transformers, LOADERS.get(str(task_type), "AutoModelForCausalLM"))
    extra: Mapping[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **extra)
        with torch.device("meta"):
            return loader.from_config(config)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the base model {name}: {str(error).splitlines()[0]}; give --base") from error
