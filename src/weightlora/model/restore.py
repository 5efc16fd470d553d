"""Restore a model and the random states, bit for bit, after a block that changes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def untouched(model: nn.Module, *, seed: int, buffers: bool = True) -> Generator[None]:
    """Seed the random generators for the block; restore the model and the random states when it ends.

    Restored are, also after an exception:

    - the module tree and all attributes of every module: hooks, train/eval mode, flags, the configuration;
    - ``requires_grad`` and ``.grad`` of the parameters, and the content of buffers;
    - the states of Python's, NumPy's and torch's global generators.

    The block may wrap, add and remove modules and change buffers. It must not write to the values of the model's own
    parameters: restoring those would need a copy of the model.

    Args:
        model: The model that the block changes.
        seed: Seed of all three generators inside the block.
        buffers: Copy the content of buffers, and restore it. Some quantised models have all their weights in buffers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with untouched(model, seed=0):
        ...     model.eval()[0] = nn.Identity()
        >>> model.training, type(model[0]).__name__
        (True, 'Linear')
    """
    with seeded(seed):
        restore = _model_restorer(model, buffers=buffers)
        try:
            yield
        finally:
            restore()


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed Python's, NumPy's and torch's generators for the block, and restore their states when it ends.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(1)
        >>> with seeded(0):
        ...     print(torch.equal(torch.rand(1), first))
        True
    """
    restore = _random_restorer()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        restore()


@contextmanager
def restored_on_error(model: nn.Module) -> Generator[None]:
    """Restore the model if the block raises; the block may change modules and attributes, but no values.

    Unlike :func:`untouched` it copies no buffers, in which some quantised models have all their weights.

    Args:
        model: The model that the block changes.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with restored_on_error(model):
        ...     model[0] = nn.Identity()
        ...     raise KeyError
        Traceback (most recent call last):
        ...
        KeyError
        >>> type(model[0]).__name__
        'Linear'
    """
    restore = _model_restorer(model, buffers=False)
    try:
        yield
    except BaseException:
        restore()
        raise


def _model_restorer(model: nn.Module, *, buffers: bool = True) -> Callable[[], None]:
    """Return a function that restores everything of the model but its parameters' values.

    Args:
        model: The model that is going to change.
        buffers: Copy the content of buffers, and restore it as well.
    """
    _reshard(model)
    modules = [(module, _attribute_restorer(vars(module))) for module in model.modules()]
    configs = [_attribute_restorer(vars(c)) for c in _configurations(model)]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if buffers else []

    def restore() -> None:
        _reshard(model)
        for _, restore_attributes in modules:
            restore_attributes()
        for restore_attributes in configs:
            restore_attributes()
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in contents:
                buffer.copy_(value)

    return restore


def _reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 gathered for a forward pass, so that the shards are saved and restored."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _attribute_restorer(attributes: dict[str, Any]) -> Callable[[], None]:
    """Return a function that restores a ``__dict__`` and the content of its containers, one level deep.

    Containers are refilled, not replaced: a hook's handle refers to its dictionary.
    """
    saved = dict(attributes)
    contents = {key: value.copy() for key, value in saved.items() if isinstance(value, (dict, list, set))}

    def restore() -> None:
        attributes.clear()
        attributes.update(saved)
        for key, content in contents.items():
            container = attributes[key]
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)

    return restore


def _configurations(model: nn.Module) -> Iterator[Any]:
    """The transformers configurations in the tree, each once; PEFT writes to them."""
    from transformers import PretrainedConfig

    found = {id(c): c for m in model.modules() if isinstance(c := vars(m).get("config"), PretrainedConfig)}
    yield from found.values()


def _random_restorer() -> Callable[[], None]:
    """Return a function that restores the states of the global generators."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


@contextmanager
def evaluated(*modules: nn.Module) -> Generator[None]:
    """Switch dropout off for the length of the block; each module then has its former mode again.

    4-bit layers keep their mode. They compute the same in either, but on some CPUs bitsandbytes packs their weights for
    good in evaluation mode, and rounds the scales.
    """
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = any("quant_state" in vars(weight) for weight in part.parameters(recurse=False))
    try:
        yield
    finally:
        for part in training:
            part.training = True
