"""One autograd function computes base and adapter in place: base + s·B·A·drop(x).

It saves x, r numbers per token and the dropout mask for the backward pass; the frozen base layer saves only its weight.
Tensors of rank size are stored as (r, tokens), because matrix products along the long side are two to five times faster
on a CPU. This file uses tensors only, no modules.

Dropout on a CPU draws the gaps between dropped values instead of one number per value. Each value is dropped with
probability p, independently, so the distance to the next dropped value is geometric. Drawing the distances takes p·n
random numbers instead of n and saves two bytes for each, which on a CPU is twenty times faster than a mask at p = 0.05.
Other devices draw n numbers and save one byte for each.

A *mask* is one of two things: a vector of gaps (integers; the first is one less, so that running sums are positions),
or booleans of the values' shape, True = kept. It is small, because it is saved for the backward pass. :func:`unpack`
turns it into the positions or booleans that :func:`zeroed` and :func:`zero` take.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weightlora.model.torch_private import is_fake

Dropout = Literal["input", "rank"]
"""Where dropout acts: on x, as in PEFT, or on the r numbers per token that ``lora_A`` returns."""


class Step(NamedTuple):  # created at each call, in a fifth of a frozen dataclass's time
    """Settings of one call of one layer."""

    scale: float
    """s·ω/(1−p)."""
    p: float
    dropout: Dropout
    dtype: torch.dtype
    """Type in which the adapter is computed."""
    in_place: bool
    """Whether only this call holds the base output."""
    narrow: bool
    """Whether the base layer's input had the type of its output, so that x may be saved in that type."""


class Fused(torch.autograd.Function):
    """Frozen layer plus LoRA product: y = base + s·B·A·drop(x).

    With ``weight`` (out, in) it also computes the gradient of ``base`` = W0·x. With ``leaf`` the gate is closed: y is
    base, and ∂L/∂ω accumulates in ``leaf.grad``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        leaf: Tensor | None,
        step: Step,
    ) -> Tensor:
        """Compute y and save what the backward pass needs."""
        rows = _rows(x).to(step.dtype)  # (tokens, in)
        a_, b_ = a.to(step.dtype), b.to(step.dtype)
        dropped_x, mask = drop(rows, step.p) if step.p > 0 and step.dropout == "input" else (rows, None)
        u = a_ @ dropped_x.t()  # (r, tokens)
        if step.p > 0 and step.dropout == "rank":
            mask = torch.empty_like(u, dtype=torch.bool).bernoulli_(1 - step.p)
            u.mul_(mask)
        del dropped_x  # as large as x: free it before y is allocated
        y = base if step.in_place else base.clone(memory_format=torch.contiguous_format)
        if step.in_place:
            ctx.mark_dirty(base)
        if leaf is None:
            _add_product(_rows(y), u.t(), b_.t(), step.scale)

        _, needs_x, _, needs_a, needs_b, needs_leaf, _ = ctx.needs_input_grad
        kept = None
        if needs_a:
            narrowest = min(step.dtype, y.dtype if step.narrow else step.dtype, key=lambda dtype: dtype.itemsize)
            kept = x.to(narrowest) if narrowest.itemsize < x.dtype.itemsize else x
        ctx.save_for_backward(
            kept, weight, a, b, u if needs_b or needs_leaf else None, mask if needs_x or needs_a else None
        )
        ctx.step, ctx.shape, ctx.closed = step, x.shape, leaf is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradients of the arguments of :meth:`forward`."""
        with without_autocast(gradient):
            return _gradients(ctx, gradient)


def _is_merging_faster(p: float, rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether one product with W0 + s·B·A is faster than adding the adapter's product to that with W0.

    On a CPU the two take the same time at 1.6 tokens per input feature. With half precision W0 + s·B·A would lose most
    of B·A, and with dropout it would differ from token to token; then the answer is no.

    Args:
        p: Probability of dropout.
        rows: (..., features), the tokens to multiply.
        dtype: Type in which the adapter is computed.
    """
    twice = rows.numel() >= 2 * rows.shape[-1] ** 2
    return twice and p == 0 and rows.dtype == dtype and dtype.itemsize >= 4


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, u, mask = ctx.saved_tensors
    step: Step = ctx.step
    needs_base, needs_x, _, needs_a, needs_b, needs_leaf, _ = ctx.needs_input_grad
    dy = _rows(gradient)
    dy_, a_, b_ = dy.to(step.dtype), a.to(step.dtype), b.to(step.dtype)
    grad_base = gradient if needs_base else None
    grad_x = grad_a = grad_b = None
    weight_ = None if weight is None else weight.to(dy.dtype)
    if ctx.closed:
        if needs_x and weight_ is not None:
            grad_x = dy @ weight_
        grad_leaf = torch.sum(u.float() * (b_.t() @ dy_.t()).float()) * step.scale if needs_leaf else None
        grad_a, grad_b = (torch.zeros_like(a) if needs_a else None), (torch.zeros_like(b) if needs_b else None)
        return grad_base, _shaped(grad_x, ctx.shape), None, grad_a, grad_b, grad_leaf, None

    if needs_b:  # first, so that dy is still in the cache for h
        grad_b = (u @ dy_).mul_(step.scale).t()
    if needs_x or needs_a:
        h = (b_.t() @ dy_.t()).mul_(step.scale)  # (r, tokens)
        if mask is not None and step.dropout == "rank":
            h.mul_(mask)
            mask = None  # nothing else is dropped
        dropped = None if mask is None else unpack(mask)
        if needs_a:
            rows = _rows(x).to(step.dtype)
            grad_a = h @ (rows if dropped is None else zeroed(rows, dropped))
        if needs_x and weight_ is not None and _is_merging_faster(step.p, dy, step.dtype):
            grad_x = dy @ torch.addmm(weight_, b_, a_, alpha=step.scale)  # one product with W0 + s·B·A
        elif needs_x:
            grad_x = h.t() @ a_
            if dropped is not None:
                zero(grad_x, dropped)
            if weight_ is not None:
                grad_x = _add_product(grad_x, dy, weight_)
    return grad_base, _shaped(grad_x, ctx.shape), None, grad_a, grad_b, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Add ``scale · left @ right`` to ``total`` in place, with one rounding if ``total`` has another type."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, alpha=scale)
    return total.add_(left @ right, alpha=scale)


def _shaped(rows: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if rows is None else rows.view(shape)


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) → (tokens, features)."""
    return tensor.reshape(-1, tensor.shape[-1])


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast: the types are chosen already, and autocast ignores operations in place."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# -- dropout -----------------------------------------------------------------------------------------------------------


def drop(values: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return a contiguous copy of ``values`` with the dropped ones zero, the rest not scaled, and the mask.

    Args:
        values: A tensor of any shape.
        p: Probability of dropping a value, 0 < p < 1. The device's global generator draws.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> ones = torch.ones(100, 1000)
        >>> copy, mask = drop(ones, p=0.05)
        >>> round(copy.mean().item(), 2)
        0.95
        >>> zeroed(ones, unpack(mask)).equal(copy)
        True
    """
    if values.device.type != "cpu":
        mask = torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p)
        return zeroed(values, mask), mask
    n = values.numel()
    # More are dropped once in 10^13 masks; then the last values are kept.
    most = math.ceil(n * p + 8 * math.sqrt(n * p * (1 - p))) + 32
    # P(gap > k) = P(v < (1−p)^k) for v uniform in (0, 1]; torch.rand is in [0, 1). v has 24 bits: it is at least 2^-24.
    rate = max(-math.log1p(-p), 1e-30)  # so that no gap is infinite
    behind = 2 * n + 2  # any gap that leads behind the last value, also after rounding to float32
    longest = min(24 * math.log(2) / rate + 1, behind)
    kind = torch.int16 if longest < 2**15 else torch.int32 if longest < 2**30 else torch.int64
    gaps = torch.rand(most, dtype=torch.float32).neg_().log1p_().div_(-rate).add_(1).clamp_(max=behind)
    gaps = gaps.to(kind)  # rounds down
    gaps[:1].sub_(1)
    dropped = unpack(gaps)
    # A fake tensor, with which bytes are counted, has no numbers: take the expected count.
    inside = round(n * p) if is_fake(values) else int(torch.searchsorted(dropped, n))
    mask = gaps[:inside].clone()  # without the clone the backward pass would hold all of it
    return zeroed(values, dropped[:inside]), mask


def unpack(mask: Tensor) -> Tensor:
    """Return the flat positions of the dropped values, or the booleans, for :func:`zeroed` and :func:`zero`."""
    return mask if mask.dtype == torch.bool else mask.cumsum(0)


def zeroed(values: Tensor, unpacked: Tensor) -> Tensor:
    """Return a contiguous copy of ``values`` with zeros where they are dropped."""
    if unpacked.dtype == torch.bool:
        return values * unpacked
    copy = values.clone(memory_format=torch.contiguous_format)
    zero(copy, unpacked)
    return copy


def zero(values: Tensor, unpacked: Tensor) -> None:
    """Write zeros into the contiguous ``values`` where they are dropped."""
    if unpacked.dtype == torch.bool:
        values.mul_(unpacked)
    else:
        values.view(-1).index_fill_(0, unpacked, 0)
