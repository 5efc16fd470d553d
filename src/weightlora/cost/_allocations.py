"""Every allocation of a training step, recorded on the meta device: shapes and types, no numbers, no weights.

A model on torch's meta device runs the forward and the backward pass of its own code. A dispatch mode sees each new
storage, and a weak reference sees when it is freed. So the bytes that are there at any moment are known for any
architecture, with or without gradient checkpointing, in about a second for each 40,000 operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightlora.cost._kernels import Device, kernels_of
from weightlora.model.torch_private import READ_VALUE, TorchDispatchMode, storage_id

Part = Literal["saved", "logits", "gradients", "working"]
"""What a storage is for.

- ``saved``: made by the forward pass below the output head.
- ``logits``: made from the output head on: the logits, the loss, and their gradients.
- ``gradients``: the gradient of a parameter.
- ``working``: any other storage of the backward pass.
"""
PARTS: tuple[Part, ...] = ("saved", "logits", "gradients", "working")


_NONZERO = torch.ops.aten.nonzero.default


@dataclass(frozen=True)
class Allocations:
    """The storages of one forward and backward pass, in the order in which they are made and freed."""

    sizes: tuple[int, ...]
    """Bytes of each storage, in the order in which they are made."""
    parts: tuple[Part, ...]
    """What each storage is for."""
    events: tuple[int, ...]
    """Storage i is made: i. Storage i is freed: ~i, which is −i − 1."""


Known = tuple[dict[Any, list[Any]], set[Any]]
"""Shapes of results, and operations that return a view: shared by several recordings, they make the later ones fast."""


def record_step(
    model: nn.Module,
    make_loss: Callable[[], Tensor],
    head: nn.Module | None,
    device: Device,
    known: Known | None = None,
) -> Allocations:
    """Run a forward and a backward pass and return their allocations; parameters of the model are not counted.

    Args:
        model: On the meta device, in training mode, without gradients.
        make_loss: Makes the batch and returns its loss.
        head: The layer that makes the logits; None counts them as ``saved``.
        device: See :data:`Device`.
        known: See :data:`Known`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.ReLU(), nn.Linear(8, 1, device="meta"))
        >>> step = record_step(net, lambda: net(torch.empty(5, 4, device="meta")).sum(), net[2], "cpu")
        >>> sum(size for size, part in zip(step.sizes, step.parts) if part == "gradients") == 4 * (4 * 8 + 8 + 8 + 1)
        True
    """
    recorder = _Recorder(model, ({}, set()) if known is None else known)
    handle = None if head is None else head.register_forward_pre_hook(recorder.enter_head)
    try:
        with kernels_of(device), recorder:
            loss = make_loss()
            recorder.begin_backward()
            loss.backward()
            del loss
    finally:
        if handle is not None:
            handle.remove()
    recorder.take_gradients(model)
    return Allocations(tuple(recorder.sizes), tuple(recorder.parts), tuple(recorder.events))


class _Recorder(TorchDispatchMode):
    """Notes each new storage, and when it is freed."""

    def __init__(self, model: nn.Module, known: Known) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.parts: list[Part] = []
        self.events: list[int] = []
        self._part: Part = "saved"
        self._backward = False
        #: Number of each storage that is there; -1 for what was there before.
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._known, self._views = known
        for tensor in (*model.parameters(), *model.buffers()):
            self._note(tensor, is_new=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; a question about a batch's values is answered: its rows are full."""
        if func is READ_VALUE and args[0].dtype == torch.bool:
            return True
        if func is _NONZERO:
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        else:
            result = self._run(func, args, kwargs or {})
        for tensor in _tensors(result):
            self._note(tensor)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, or make new tensors like those of the same operation on the same shapes.

        The meta device computes many shapes in Python, and the blocks of a model repeat them.
        """
        for tensor in _tensors(args):
            self._note(tensor, is_new=False)
        if func in self._views:
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        known = self._known.get(key)
        if known is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        tensors = result if isinstance(result, tuple) else (result,)
        if all(isinstance(tensor, Tensor) and storage_id(tensor) not in self._numbers for tensor in tensors):
            self._known[key] = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        else:  # a view, an operation in place, or a number
            self._views.add(func)
        return result

    def _note(self, tensor: Tensor, *, is_new: bool = True) -> None:
        key = storage_id(tensor)
        if key in self._numbers:
            return
        storage = tensor.untyped_storage()
        self._numbers[key] = -1
        if is_new:
            self._numbers[key] = number = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.parts.append(self._part)
            self.events.append(number)
        self._references[key] = weakref.ref(storage, partial(self._free, key))

    def _free(self, key: int, _: Any) -> None:
        number = self._numbers.pop(key)
        if number >= 0:
            self.events.append(~number)
        del self._references[key]

    def enter_head(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """From here on storages belong to the logits, in the backward pass until the head's input has its gradient."""
        if self._backward:  # a checkpointed block computed again
            return
        self._part = "logits"
        if isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(self._leave_head)

    def _leave_head(self, _: Tensor) -> None:
        self._part = "working"

    def begin_backward(self) -> None:
        """The forward pass has ended."""
        self._backward = True
        if self._part == "saved":  # no head
            self._part = "working"

    def take_gradients(self, model: nn.Module) -> None:
        """Name the gradients, and delete them."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self.parts[self._numbers[storage_id(parameter.grad)]] = "gradients"
        for parameter in model.parameters():
            parameter.grad = None


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of a result or of arguments, lists of tensors included."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors(value)


def _key(value: Any) -> Any:
    """What the shape of a result depends on; 1 is not 1.0, which makes a float of an integer."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_key(part) for part in value)  # pyright: ignore[reportUnknownVariableType]
    return type(value), value
