"""Every allocation of a training step, recorded on the meta device: shapes and types, no numbers, no weights.

A model on torch's meta device runs the forward and the backward pass of its own code. A dispatch mode sees each new
storage, and a weak reference sees when it is freed. So the bytes that are there at any moment are known for any
architecture, with or without gradient checkpointing, in about a second for each 40,000 operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
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

Part = Literal["saved", "logits", "gradients", "working"]
"""What a storage is for.

- ``saved``: made by the forward pass below the output head.
- ``logits``: made from the output head on: the logits, the loss, and their gradients.
- ``gradients``: the gradient of a parameter.
- ``working``: any other storage of the backward pass.
"""
PARTS: tuple[Part, ...] = ("saved", "logits", "gradients", "working")
Device = Literal["cpu", "cuda"]
"""Whose kernels are imitated: on a GPU dropout saves a byte for each value, and attention with dropout is fused."""


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


def record_step(model: nn.Module, make_loss: Callable[[], Tensor], head: nn.Module | None, device: Device) -> Allocations:
    """Run a forward and a backward pass and return their allocations; parameters of the model are not counted.

    Args:
        model: On the meta device, in training mode, without gradients.
        make_loss: Makes the batch and returns its loss.
        head: The layer that makes the logits; None counts them as ``saved``.
        device: See :data:`Device`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.ReLU(), nn.Linear(8, 1, device="meta"))
        >>> step = record_step(net, lambda: net(torch.empty(5, 4, device="meta")).sum(), net[2], "cpu")
        >>> sum(size for size, part in zip(step.sizes, step.parts) if part == "gradients") == 4 * (4 * 8 + 8 + 8 + 1)
        True
    """
    recorder = _Recorder(model)
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


class _Recorder(TorchDispatchMode):
    """Notes each new storage, and when it is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.parts: list[Part] = []
        self.events: list[int] = []
        self._part: Part = "saved"
        self._backward = False
        #: Number of each storage that is there; -1 for what belongs to the model.
        self._numbers: dict[int, int] = {storage_id(tensor): -1 for tensor in (*model.parameters(), *model.buffers())}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; a question about a batch's values is answered: its rows are full."""
        if func is READ_VALUE and args[0].dtype == torch.bool:
            return True
        if func is _NONZERO:
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor) -> None:
        key = storage_id(tensor)
        if key in self._numbers:
            return
        storage = tensor.untyped_storage()
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.parts.append(self._part)
        self.events.append(number)
        self._numbers[key] = number
        self._references[key] = weakref.ref(storage, partial(self._free, key))

    def _free(self, key: int, _: Any) -> None:
        self.events.append(~self._numbers.pop(key))
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
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if self._cuda or not dropout_p:
            return _FusedAttention.apply(query, key, value, attn_mask)  # pyright: ignore
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **kwargs}
        return functional.scaled_dot_product_attention(query, key, value, **options)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else functional.dropout(input, p, training, inplace)


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
    """The storages of ``grouped_mm``, which the meta device has for bfloat16 alone: each row times one of the matrices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor) -> Tensor:
        needs_rows, needs_matrices = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_matrices else None, matrices)
        ctx.rows = rows.shape, rows.dtype
        return rows.new_empty((rows.shape[0], matrices.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_rows, needs_matrices = ctx.needs_input_grad
        shape, dtype = ctx.rows
        _, matrices = ctx.saved_tensors
        return (
            grad.new_empty(shape, dtype=dtype) if needs_rows else None,
            torch.empty_like(matrices) if needs_matrices else None,
        )
