"""What a CPU's or a GPU's kernels save for the backward pass, on the meta device.

The meta device has no fused attention, and none of the dropout of a GPU: it would save every probability.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.torch_private import is_grouped_product

Device = Literal["cpu", "cuda"]
"""Whose kernels are imitated: on a GPU dropout saves a byte for each value, and attention with dropout is fused."""


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
