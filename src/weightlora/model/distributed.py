"""Averages, copies and agreement over torch.distributed; a single process skips them.

Parameters that are replaced inside a running job drift apart silently. So each step of the selection is the same on all
processes, and their results are compared at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightlora.errors import SelectionError

T = TypeVar("T")

_SAME_START = "give all of them the same model, seed and options, and each its own batches"


def process_count() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if _in_group() else 1


def is_first() -> bool:
    """Whether this is the first process, which writes files."""
    return not _in_group() or dist.get_rank() == 0


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite ``tensors`` with the first process's, as DDP does when it starts."""
    if process_count() > 1:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)


def has_shards(module: nn.Module) -> bool:
    """Whether a parameter of ``module`` is sharded: FSDP2, or tensor parallelism."""
    if not _in_group():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def make_whole(module: nn.Module) -> None:
    """Replace the trainable parameters of ``module`` that are sharded (FSDP2) by whole copies.

    PEFT's trainable copy of a head is sharded like the head, but FSDP does not gather it for a forward pass.
    """
    if not _in_group():
        return
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad and isinstance(parameter, DTensor):
                setattr(part, name, nn.Parameter(parameter.full_tensor().detach()))


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded (FSDP2), on every process; any other tensor unchanged."""
    if not _in_group():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Replace every ``.grad`` by its mean over the processes; missing ones count as zero if another process has it."""
    if process_count() == 1:
        return
    have = torch.tensor([float(t.grad is not None) for t in tensors], device=tensors[0].device)
    dist.all_reduce(have)
    shared = [tensor for tensor, count in zip(tensors, have.tolist(), strict=True) if count]
    if not shared:
        return
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in shared]
    flat = torch.cat([gradient.detach().float().flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= process_count()
    for tensor, mean in zip(shared, flat.split([t.numel() for t in shared]), strict=True):
        tensor.grad = mean.reshape(tensor.shape).to(tensor.dtype)


def add_up(numbers: Tensor) -> Tensor:
    """Return ``numbers`` summed over the processes, on the device that they are on."""
    if process_count() == 1:
        return numbers
    summed = numbers.clone() if numbers.is_cuda or dist.get_backend() != "nccl" else numbers.cuda()
    dist.all_reduce(summed)
    return summed.to(numbers.device)


def average(numbers: Tensor) -> Tensor:
    """Return the mean of ``numbers`` over the processes, on the device that they are on."""
    return add_up(numbers) / process_count() if process_count() > 1 else numbers


def from_first(make: Callable[[], T]) -> T:
    """Return what ``make()`` gives on the first process, on every process.

    An error there is raised on all processes; otherwise the others would wait for ever.
    """
    if process_count() == 1:
        return make()
    answer: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_first():
        try:
            answer[0] = (make(), None)
        except Exception as error:
            answer[0] = (None, error)
    dist.broadcast_object_list(answer, src=0)
    value, error = answer[0]
    if error is not None:
        raise error
    return value  # pyright: ignore[reportReturnType]  # None only where make() gave None


def require_agreement(value: str, what: str, advice: str = _SAME_START) -> None:
    """Raise unless ``value`` is the same on every process.

    Args:
        value: This process's.
        what: Its name, for the error.
        advice: What to change, for the error.

    Raises:
        SelectionError: With the number of different values.
    """
    if process_count() == 1:
        return
    values: list[str] = [""] * process_count()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise SelectionError(
            f"{what} differs between the {len(values)} processes ({len(set(values))} different values); {advice}"
        )


def require_equal(tensors: Iterable[Tensor], what: str) -> None:
    """Raise unless ``tensors`` are the same on every process, bit for bit.

    Raises:
        SelectionError: They are not.
    """
    if process_count() > 1:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        require_agreement(digest.hexdigest(), what)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
