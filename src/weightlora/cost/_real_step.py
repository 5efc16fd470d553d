"""The allocations of a training step of a real model: its own batch, loss and weights, without their arithmetic.

Floating-point operations compute shapes and types alone, with fake tensors. Operations on whole numbers, such as
tokens, masks and positions, are computed: a model's course may depend on them. Where the course depends on other values
as well, as that of some experts, the step has to be run for real, and the same storages are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.cost._allocations import Allocations, Recorder, tensors_of
from weightlora.cost.empty_model import quantisation_tensors
from weightlora.model.torch_private import READ_VALUE, fake_tensors, is_fake, storage_id

Losses = Callable[[], Iterable[Tensor]]
"""Runs the forward passes of one optimizer step; each loss it yields is one backward pass."""


def record_real_step(model: nn.Module, losses: Losses, *, fake: bool = True) -> Allocations:
    """Run the forward and backward passes of a step and return their allocations; weights and buffers are not counted.

    Args:
        model: In the mode in which it is trained. Its gradients are lost.
        losses: Runs the forward passes; the batch that they read is counted.
        fake: Do no arithmetic. The gradients, and what a forward pass sets on the model, are then fake tensors:
            restore the model afterwards.

    Raises:
        RuntimeError: By torch, where the model's operations depend on values of floating-point tensors; models may
            raise other errors then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> real, fake = (record_real_step(net, lambda: [net(torch.ones(5, 4)).sum()], fake=f) for f in (False, True))
        >>> real.sizes == fake.sizes, real.events == fake.events
        (True, True)
    """
    recorder = StepRecorder(model, fake=fake)
    for parameter in model.parameters():
        parameter.grad = None
    with recorder:
        for loss in losses():
            recorder.begin_backward()
            if loss.requires_grad:  # False without adapters and head
                loss.backward()
            del loss
    return recorder.recorded(model)


class StepRecorder(Recorder):
    """Notes the storages of a real model's operations; with ``fake`` it does no floating-point arithmetic."""

    def __init__(self, model: nn.Module, *, fake: bool) -> None:
        super().__init__(model)
        scales = [part for parameter in model.parameters() for part in quantisation_tensors(parameter)]
        self._fake = fake_tensors() if fake else None
        parameters = [*model.parameters()]
        own = [*parameters, *model.buffers(), *scales]
        self._own = {storage_id(tensor) for tensor in own}
        #: What operations take instead of parameters, buffers and scales.
        self._stand_ins = [] if self._fake is None else [self._fake.from_tensor(tensor) for tensor in own]
        for tensor in (*scales, *self._stand_ins):
            self.note(tensor, is_new=False)
        self.parameters = [*parameters, *self._stand_ins[: len(parameters)]]
        """The model's, and the fake tensors that stand for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or only make results of its shapes, and note what it reads and makes."""
        kwargs = kwargs or {}
        given = [*tensors_of(args), *tensors_of(tuple(kwargs.values()))]
        for tensor in given:
            self.note(tensor)  # new: a batch that was there before
        if self._fake is None or self._is_computed(func, kwargs, given):
            result = func(*args, **kwargs)
        elif func is READ_VALUE and given[0].dtype.is_floating_point:
            return 1.0  # a number for a log
        else:
            fakes = [self._fake.from_tensor(tensor) for tensor in given if not is_fake(tensor)]
            for tensor in fakes:  # while the list is there, the operation takes these
                self.note(tensor, is_new=False)
            with self._fake:
                result = func(*args, **kwargs)
        for tensor in tensors_of(result):
            self.note(tensor)
        return result

    def _is_computed(self, func: Any, kwargs: Any, given: list[Tensor]) -> bool:
        """Whether the operation is one on whole numbers that are known, and not on the model's own."""
        dtype = kwargs.get("dtype")
        if dtype is not None and not _is_whole(dtype):
            return False
        if not given:
            return dtype is not None or func.__name__.startswith("arange")
        return all(_is_whole(t.dtype) and not is_fake(t) and storage_id(t) not in self._own for t in given)


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
