"""One autograd function for a LoRA layer: base + s·B·A·drop(x), added in place.

It saves x, r numbers a token and the dropout mask for the backward pass; the frozen base layer saves only its weight.
Tensors of rank size are stored rank first, (r, tokens): matrix products then run along the long side, which is two to
five times faster on a CPU. This file knows tensors only, no modules.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weightlora.fast.dropout import Dropout, drop, unpack, zero, zeroed


class Step(NamedTuple):  # made at each call: a fifth of a frozen dataclass's time
    """What one pass of one layer needs beside tensors."""

    scale: float
    """s·ω/(1−p)."""
    p: float
    dropout: Dropout
    dtype: torch.dtype
    """In which the adapter is computed."""
    in_place: bool
    """Whether nobody but us holds the base output."""
    narrow: bool
    """Whether the layer's own input had the type of its output, so that x may be kept in that type."""


class Fused(torch.autograd.Function):
    """y = base + s·B·A·drop(x); with ``weight`` (out, in) it also computes the gradient of ``base`` = W0·x.

    With ``ear`` the gate is closed: nothing is added, and ∂L/∂ω is accumulated in ``ear.grad``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        ear: Tensor | None,
        step: Step,
    ) -> Tensor:
        """Compute y and keep what the backward pass needs."""
        rows = _rows(x).to(step.dtype)  # (tokens, in)
        a_, b_ = a.to(step.dtype), b.to(step.dtype)
        seen, mask = drop(rows, step.p) if step.p > 0 and step.dropout == "input" else (rows, None)
        u = a_ @ seen.t()  # (r, tokens)
        if step.p > 0 and step.dropout == "rank":
            mask = torch.empty_like(u, dtype=torch.bool).bernoulli_(1 - step.p)
            u.mul_(mask)
        del seen  # a copy as large as x: not held while y is made
        y = base if step.in_place else base.clone(memory_format=torch.contiguous_format)
        if step.in_place:
            ctx.mark_dirty(base)
        if ear is None:
            _add_product(_rows(y), u.t(), b_.t(), step.scale)

        _, needs_x, _, needs_a, needs_b, needs_ear, _ = ctx.needs_input_grad
        kept = None
        if needs_a:
            narrowest = min(step.dtype, y.dtype if step.narrow else step.dtype, key=lambda dtype: dtype.itemsize)
            kept = x.to(narrowest) if narrowest.itemsize < x.dtype.itemsize else x
        ctx.save_for_backward(
            kept, weight, a, b, u if needs_b or needs_ear else None, mask if needs_x or needs_a else None
        )
        ctx.step, ctx.shape, ctx.closed = step, x.shape, ear is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of the arguments of :meth:`forward`."""
        with without_autocast(gradient):
            return _gradients(ctx, gradient)


def _pays_to_merge(p: float, rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether W0 + s·B·A is fewer numbers to go over than the product with W0 that s·B·A would be added to.

    On a CPU the two take the same time where there are 1.6 times as many tokens as features that come in. Half
    precision would round most of B·A away, and what is dropped differs from token to token.

    Args:
        p: Probability of dropout.
        rows: (..., features), the tokens that are multiplied.
        dtype: In which the adapter is computed.
    """
    twice = rows.numel() >= 2 * rows.shape[-1] ** 2
    return twice and p == 0 and rows.dtype == dtype and dtype.itemsize >= 4


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, u, mask = ctx.saved_tensors
    step: Step = ctx.step
    needs_base, needs_x, _, needs_a, needs_b, needs_ear, _ = ctx.needs_input_grad
    dy = _rows(gradient)
    dy_, a_, b_ = dy.to(step.dtype), a.to(step.dtype), b.to(step.dtype)
    grad_base = gradient if needs_base else None
    grad_x = grad_a = grad_b = None
    weight_ = None if weight is None else weight.to(dy.dtype)
    if ctx.closed:
        if needs_x and weight_ is not None:
            grad_x = dy @ weight_
        heard = torch.sum(u.float() * (b_.t() @ dy_.t()).float()) * step.scale if needs_ear else None
        grad_a, grad_b = (torch.zeros_like(a) if needs_a else None), (torch.zeros_like(b) if needs_b else None)
        return grad_base, _shaped(grad_x, ctx.shape), None, grad_a, grad_b, heard, None

    if needs_b:  # first, so that dy is still in the cache for h
        grad_b = (u @ dy_).mul_(step.scale).t()
    if needs_x or needs_a:
        h = (b_.t() @ dy_.t()).mul_(step.scale)  # (r, tokens)
        if mask is not None and step.dropout == "rank":
            h.mul_(mask)
            mask = None  # that was all of it
        dropped = None if mask is None else unpack(mask)
        if needs_a:
            rows = _rows(x).to(step.dtype)
            grad_a = h @ (rows if dropped is None else zeroed(rows, dropped))
        if needs_x and weight_ is not None and _pays_to_merge(step.p, dy, step.dtype):
            grad_x = dy @ torch.addmm(weight_, b_, a_, alpha=step.scale)  # one product with W0 + s·B·A
        elif needs_x:
            grad_x = h.t() @ a_
            if dropped is not None:
                zero(grad_x, dropped)
            if weight_ is not None:
                grad_x = _add_product(grad_x, dy, weight_)
    return grad_base, _shaped(grad_x, ctx.shape), None, grad_a, grad_b, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Add ``scale · left @ right`` to ``total``, in place; a ``total`` of another type is rounded once."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, alpha=scale)
    return total.add_(left @ right, alpha=scale)


def _shaped(rows: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if rows is None else rows.view(shape)


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) → (tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """The types are chosen above; autocast would choose them again, and not for operations in place."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
