"""Hooks that only observe, and whether anything can see or change what a layer computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from weightlora.model.torch_private import forward_pre_hooks, is_hooked


@dataclass(frozen=True)
class Observer:
    """A hook of any kind that leaves inputs and outputs as they are."""

    notify: Callable[[], None]
    """Called each time that the hook runs."""

    def __call__(self, *_: Any) -> None:
        """Run the hook."""
        self.notify()


def keeps_input(module: nn.Module) -> bool:
    """Whether no forward pre-hook of ``module`` can change its input: all are :class:`Observer`."""
    return all(isinstance(hook, Observer) for hook in forward_pre_hooks(module).values())


def is_intercepted(module: nn.Module) -> bool:
    """Whether a hook, or a ``forward`` set on the instance, can see or change the output of ``module``."""
    return is_hooked(module) or "forward" in vars(module)
