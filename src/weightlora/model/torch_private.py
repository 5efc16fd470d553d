"""Every private name of torch that the package uses; ``tests/model/test_torch_private.py`` lists them.

Torch may rename these without notice, so they are in one file. No public function tells the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# -- hooks: read from a module's dictionary, because the fast step asks several times per layer and step ---------------


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether any hook is registered on ``module``."""
    own = vars(module)
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def hooks_of(module: nn.Module) -> list[Any]:
    """Every hook that is registered on ``module``."""
    return [hook for kind in _HOOKS for hook in vars(module)[kind].values()]


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """The dictionary of the forward hooks of ``module``; deleting a key removes the hook."""
    return vars(module)["_forward_hooks"]


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
    return all(isinstance(hook, Observer) for hook in vars(module)["_forward_pre_hooks"].values())


def is_intercepted(module: nn.Module) -> bool:
    """Whether a hook, or a ``forward`` set on the instance, can see or change the output of ``module``."""
    return is_hooked(module) or "forward" in vars(module)


def has_global_hooks() -> bool:
    """Whether hooks are registered for every module of the process."""
    return bool(_has_any_global_hook())


# -- tensors -----------------------------------------------------------------------------------------------------------


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` of ``module`` without ``nn.Module.__getattr__``, which is slow."""
    return vars(module)["_parameters"][name]


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether the ``buffer`` of ``module`` is in its state dict; caches and tables that the code computes are not."""
    return buffer not in vars(module)["_non_persistent_buffers_set"]


def is_view(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a view of another tensor."""
    return tensor._base is not None


def storage_id(tensor: Tensor) -> int:
    """Identity of a tensor's memory; a fake tensor, which has no address, has one too."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def fake_tensors() -> FakeTensorMode:
    """A context in which operations compute shapes and types but no numbers; real tensors may be mixed in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape and a type but no numbers."""
    return isinstance(tensor, FakeTensor)


# -- operations --------------------------------------------------------------------------------------------------------

#: The operation behind ``tensor.item()`` and ``if tensor:``.
READ_VALUE = torch.ops.aten._local_scalar_dense.default


def is_grouped_product(function: Any) -> bool:
    """Whether ``function`` multiplies groups of rows by one matrix each, as fused experts do."""
    return function is torch._grouped_mm  # pyright: ignore[reportPrivateUsage]


# -- autograd's graph --------------------------------------------------------------------------------------------------


def next_node_number() -> int:
    """The number that autograd gives the next node of its graph in this thread."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore


def node_number(node: Any) -> int:
    """The number that autograd gave ``node`` when it was made."""
    return node._sequence_nr()


def saved_tensors(node: Any) -> Iterator[tuple[str, Tensor]]:
    """What ``node`` saved for its backward pass, with its name; the name is empty for a node written in Python."""
    if isinstance(node, BackwardCFunction):
        named: list[tuple[str, Any]] = [("", node.saved_tensors)]
    else:
        names = [name.removeprefix("_raw_saved_") for name in dir(node) if name.startswith("_raw_saved_")]
        named = [(name, getattr(node, f"_saved_{name}")) for name in names]
    for name, value in named:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor):
                yield name, tensor
