"""Every allocation of a training step, recorded on the meta device: shapes and types, no numbers, no weights.

A model on torch's meta device runs the forward and the backward pass of its own code. A dispatch mode sees each new
storage, and a weak reference sees when it is freed. So the bytes that are there at any moment are known for any
architecture, with or without gradient checkpointing, in about a second for each 40,000 operations. The meta device has
no fused attention, and none of the dropout of a GPU: a function mode puts them in, else every probability were saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.torch_private import READ_VALUE, TorchDispatchMode, is_grouped_product, storage_id

Device = Literal["cpu", "cuda"]
"""Whose kernels are imitated: on a GPU dropout saves a byte for each value, and attention with dropout is fused."""
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
    recorder = _MetaRecorder(model, ({}, set()) if known is None else known)
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
    return recorder.recorded(model)


class Recorder(TorchDispatchMode):
    """Notes each new storage, and when it is freed; a subclass runs the operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.parts: list[Part] = []
        self.events: list[int] = []
        self._part: Part = "saved"
        self._backward = False
        #: Number of each storage that is there; -1 for what was there before.
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.note(tensor, is_new=False)

    def note(self, tensor: Tensor, *, is_new: bool = True) -> None:
        """Note a tensor's storage, unless it is known."""
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

    def is_known(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is noted and still there."""
        return storage_id(tensor) in self._numbers

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

    def recorded(self, model: nn.Module) -> Allocations:
        """Name the gradients, delete them, and return what was noted."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self.parts[self._numbers[storage_id(parameter.grad)]] = "gradients"
        events = tuple(self.events)
        for parameter in model.parameters():
            parameter.grad = None
        return Allocations(tuple(self.sizes), tuple(self.parts), events)


class _MetaRecorder(Recorder):
    """Runs the operations of a model on the meta device."""

    def __init__(self, model: nn.Module, known: Known) -> None:
        super().__init__(model)
        self._known, self._views = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; a question about a batch's values is answered: its rows are full."""
        if func is READ_VALUE and args[0].dtype == torch.bool:
            return True
        if func is _NONZERO:
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        else:
            result = self._run(func, args, kwargs or {})
        for tensor in tensors_of(result):
            self.note(tensor)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, or make new tensors like those of the same operation on the same shapes.

        The meta device computes many shapes in Python, and the blocks of a model repeat them.
        """
        for tensor in tensors_of(args):
            self.note(tensor, is_new=False)
        if func in self._views:
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        known = self._known.get(key)
        if known is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **kwargs)
        tensors = result if isinstance(result, tuple) else (result,)
        if all(isinstance(tensor, Tensor) and not self.is_known(tensor) for tensor in tensors):
            self._known[key] = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        else:  # a view, an operation in place, or a number
            self._views.add(func)
        return result


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors of a result or of arguments, lists of tensors included."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:  # pyright: ignore[reportUnknownVariableType]
            yield from tensors_of(value)


def _key(value: Any) -> Any:
    """What the shape of a result depends on; 1 is not 1.0, which makes a float of an integer."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_key(part) for part in value)  # pyright: ignore[reportUnknownVariableType]
    return type(value), value


# -- the kernels of a CPU or a GPU, on the meta device -----------------------------------------------------------------


@contextmanager
def kernels_of(device: Device) -> Generator[None]:
    """Make new tensors on the meta device, and save for the backward pass what ``device`` saves.

    No function mode is active in a backward pass, so a checkpointed block that is computed again needs it anew.
    """
    with torch.device("meta"), _Kernels(device):
        yield


def checkpoint(model: Any, device: Device) -> None:
    """Switch on non-reentrant gradient checkpointing in a transformers model, without hooks on the embeddings."""
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), kernels_of(device))}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    remove_input_hooks(model)


class _Kernels(TorchFunctionMode):
    """Gives the meta device the dropout and the attention of a real one; its own attention saves every probability."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._cuda = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, or what the device has in its place."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.dropout and self._cuda:
            return self._dropout(*args, **kwargs)
        if is_grouped_product(func):
            return _GroupedProduct.apply(args[0], args[1])
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **others: Any,
    ) -> Tensor:
        if self._cuda or not dropout_p:
            return _FusedAttention.apply(query, key, value, attn_mask)  # pyright: ignore
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **others)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return (
            torch.native_dropout(input, p, True)[0]
            if training and 0 < p < 1
            else functional.dropout(input, p, training, inplace)
        )


class _FusedAttention(torch.autograd.Function):
    """The storages of fused attention: its inputs and output are saved, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty((rows, length, heads, value.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty((rows, heads, length), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:3]
        return (*(torch.empty_like(tensor.transpose(1, 2)).transpose(1, 2) for tensor in inputs), None)


class _GroupedProduct(torch.autograd.Function):
    """The storages of ``grouped_mm``: each row times one of the matrices. The meta device has it for bfloat16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, matrices)
        ctx.rows = rows.shape, rows.dtype
        return rows.new_empty((rows.shape[0], matrices.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_rows, needs_matrices = ctx.needs_input_grad
        shape, dtype = ctx.rows
        _, matrices = ctx.saved_tensors
        return (
            grads[0].new_empty(shape, dtype=dtype) if needs_rows else None,
            torch.empty_like(matrices) if needs_matrices else None,
        )
