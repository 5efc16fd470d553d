"""Hooks on a module: which there are, and hooks that only observe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Watch:
    """A hook that only looks on: what goes in and comes out stays as it is."""

    see: Callable[[], None]

    def __call__(self, *_: Any) -> None:
        """The hook, of any kind."""
        self.see()


def hooks_of(module: nn.Module) -> list[Any]:
    """Every hook that is registered on ``module``."""
    return [hook for kind in _KINDS for hook in vars(module)[kind].values()]


def only_watched_before(module: nn.Module) -> bool:
    """Whether all forward pre-hooks of ``module`` are of :class:`Watch`: its input stays as it is."""
    return all(isinstance(hook, Watch) for hook in vars(module)["_forward_pre_hooks"].values())


def has_global_hooks() -> bool:
    """Whether hooks are registered for every module of the process."""
    return bool(_has_any_global_hook())


def is_watched(base: Any) -> bool:
    """Whether someone else has a say in the base layer's output, and may hold it."""
    return is_hooked(base) or "forward" in vars(base)


def is_hooked(module: nn.Module) -> bool:
    """Whether any hook is registered on ``module``."""
    own = vars(module)  # asked several times a layer and step: no loop
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )
