"""Bytes that each set of sites would save for the backward pass, from one forward pass with LoRA on all sites.

Each node of autograd's graph holds the tensors that it saved. With fewer adapters, the graph keeps the nodes that have
a kept adapter below them, without the nodes of dropped adapters. So one forward pass gives the exact bytes of all 2ⁿ
sets. With fake tensors it needs no arithmetic.

The allocations of a step are those of a real model with its own batch, loss and weights, without their arithmetic.
Floating-point operations compute shapes and types alone, with fake tensors. Operations on whole numbers, such as
tokens, masks and positions, are computed: a model's course may depend on them. Where the course depends on other values
as well, as that of some experts, the step has to be run for real, and the same storages are recorded.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weightlora.cost._allocations import Allocations, Recorder, tensors_of
from weightlora.cost.empty_model import quantisation_tensors
from weightlora.cost.knapsack import ANY, Cause, Cost, Item, make_cost
from weightlora.errors import OptionError, SelectionError
from weightlora.model.layers import lora_layers
from weightlora.model.torch_private import (
    READ_VALUE,
    Observer,
    fake_tensors,
    is_fake,
    next_node_number,
    node_number,
    saved_tensors,
    storage_id,
)

#: A trained parameter, its gradient and AdamW's two moments.
ADAMW_COPIES = 4
#: A product saves a factor only for the gradient of the other factor: name of what is saved → input that needs it.
_FACTORS = {
    "MulBackward0": {"self": 1, "other": 0},
    "MmBackward0": {"self": 1, "mat2": 0},
    "BmmBackward0": {"self": 1, "mat2": 0},
    "AddmmBackward0": {"mat1": 2, "mat2": 1},
    "BaddbmmBackward0": {"batch1": 2, "batch2": 1},
}
LEAF = "torch::autograd::AccumulateGrad"
Losses = Callable[[], Iterable[Tensor]]
"""Runs the forward passes of one optimizer step; each loss it yields is one backward pass."""


def parameter_cost(model: nn.Module, *, vectors: int = 0) -> Cost:
    """Bytes of the trained parameters with their gradients and the state of AdamW.

    Args:
        model: A model with LoRA on all sites.
        vectors: Further vectors, as long as a layer's output, that each adapter is going to have.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
        >>> parameter_cost(model).of([0]) == 4 * 4 * 2 * (4 + 6)  # four copies of fp32 numbers
        True
    """
    layers = lora_layers(model)
    causes = leaf_causes(layers)
    items = [
        Item(ADAMW_COPIES * p.numel() * p.element_size(), (causes.get(id(p), (ANY, 1 << len(layers))),))
        for p in model.parameters()
        if p.requires_grad
    ]
    matrices: list[Any] = [layer.lora_B["default"].weight for layer in layers.values()]
    items += [
        Item(ADAMW_COPIES * vectors * b.shape[0] * b.element_size(), ((1 << i, 1 << i),))
        for i, b in enumerate(matrices)
        if vectors
    ]
    return make_cost(len(layers), items, order=())


def saved_cost(model: nn.Module, losses: Losses, *, fake: bool = False) -> Cost:
    """Bytes that autograd holds at the end of the forward pass: each storage once, without parameters.

    Args:
        model: A model with LoRA on all sites, in the mode in which it is trained.
        losses: Runs the forward passes; of several, for example of micro-batches, the largest counts.
        fake: Do no arithmetic, see :func:`weightlora.cost.saved_bytes.record_real_step`.

    Raises:
        OptionError: Gradient checkpointing is on: then the graph does not show what is saved.
        SelectionError: The loss depends on no trained parameter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> model = get_peft_model(net, LoraConfig(r=1, target_modules=["0", "2"]))
        >>> cost = saved_cost(model, lambda: [model(torch.ones(5, 4)).sum()])
        >>> inputs, ranks, tanh = 4 * 5 * 4, 4 * 5 * 1, 4 * 5 * 4  # what tanh saves is the upper site's input
        >>> cost.of([0]) == inputs + ranks + tanh, cost.of([1]) == tanh + ranks, cost.of([0, 1]) == cost.of([0]) + ranks
        (True, True, True)
    """
    if is_checkpointed(model):
        raise OptionError(
            "saved bytes cannot be counted under gradient checkpointing: autograd's graph does not show them"
        )
    layers = lora_layers(model)
    parameters = list(model.parameters())
    mode = StepRecorder(model, fake=True) if fake else None
    if mode is not None:
        parameters = mode.parameters
    ours = {storage_id(parameter) for parameter in parameters}
    costs: list[Cost] = []
    with marked(layers) as marks, mode or nullcontext():
        for loss in losses():
            costs.append(_saved_by(loss, layers, marks, ours))
            marks.clear()
    return max(costs, key=lambda cost: cost.of_all)


@dataclass
class Marks:
    """Which part of the model made each node of autograd's graph, and how long its forward pass took."""

    numbers: list[int] = field(default_factory=list[int])
    """Number of the first node of each part."""
    sites: list[int | None] = field(default_factory=list["int | None"])
    """Each part: a site's adapter, or None for the frozen model."""
    seconds: list[float] = field(default_factory=list[float])
    order: dict[int, None] = field(default_factory=dict[int, None])
    """The sites in the order of the forward pass."""

    def begin(self, site: int | None) -> None:
        """Begin the part of ``site``."""
        self.numbers.append(next_node_number())
        self.sites.append(site)
        self.seconds.append(now())
        if site is not None:
            self.order[site] = None

    def own(self, node: Any) -> int:
        """The site whose adapter made the node, as a set; ``ANY`` for the frozen model."""
        place = bisect_right(self.numbers, node_number(node)) - 1
        site = self.sites[place] if place >= 0 else None
        return ANY if site is None else 1 << site

    def forward_seconds(self) -> Iterator[tuple[int, float]]:
        """The seconds of each adapter's forward pass."""
        for site, start, end in zip(self.sites, self.seconds, self.seconds[1:], strict=False):
            if site is not None:
                yield site, end - start

    def clear(self) -> None:
        """Delete the marks of a forward pass, but not the order of the sites."""
        for marks in (self.numbers, self.sites, self.seconds):
            marks.clear()


@contextmanager
def marked(layers: Mapping[str, LoraLayer]) -> Generator[Marks]:
    """Mark the beginning and end of each adapter within the block, apart from the frozen layer inside it."""
    marks = Marks()
    handles: list[Any] = []
    for i, layer in enumerate(layers.values()):
        adapter, frozen = Observer(partial(marks.begin, i)), Observer(partial(marks.begin, None))
        whole: Any = layer
        base = layer.get_base_layer()
        handles += [whole.register_forward_pre_hook(adapter), base.register_forward_pre_hook(frozen)]
        handles += [base.register_forward_hook(adapter), whole.register_forward_hook(frozen)]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def graph(loss: Any, leaves: Mapping[int, Cause], rest: int) -> dict[Any, int]:
    """Each node below the loss, inputs first, with the set of sites below it."""
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        raise SelectionError("the loss depends on nothing that is trained; does loss_fn detach it?")
    below: dict[Any, int] = {}
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack[-1]
        inputs = [node_below for node_below, _ in node.next_functions if node_below is not None]
        waiting = [node_below for node_below in inputs if node_below not in below]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if node.name() == LEAF:  # a head, or an input that requires a gradient, is always there
            below[node] = leaves.get(id(node.variable), (ANY, rest))[1]
        else:
            below[node] = 0
            for node_below in inputs:
                below[node] |= below[node_below]
    return below


def _saved_by(loss: Any, layers: Mapping[str, LoraLayer], marks: Marks, parameters: set[int]) -> Cost:
    """The bytes of one forward pass."""
    below = graph(loss, leaf_causes(layers), 1 << len(layers))
    causes: dict[int, list[Cause]] = {}
    sizes: dict[int, int] = {}
    for node, sites in below.items():
        wanted_for = _FACTORS.get(node.name(), {})
        for name, tensor in saved_tensors(node):
            storage = storage_id(tensor)
            if storage in parameters or _is_number(tensor):
                continue
            other = node.next_functions[wanted_for[name]][0] if name in wanted_for else None
            cause = (marks.own(node), sites if name not in wanted_for else below.get(other, 0))
            causes.setdefault(storage, []).append(cause)
            sizes[storage] = tensor.untyped_storage().nbytes()
    return make_cost(len(layers), [Item(sizes[s], tuple(causes[s])) for s in sizes], marks.order)


def leaf_causes(layers: Mapping[str, LoraLayer]) -> dict[int, Cause]:
    """The cause of each adapter's parameters, by their identity."""
    modules: dict[int, Any] = dict(enumerate(layers.values()))
    return {id(p): (1 << i, 1 << i) for i, layer in modules.items() for p in layer.parameters() if p.requires_grad}


def is_checkpointed(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in a transformers model."""
    from transformers import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) and module.is_activation_checkpointing for module in model.modules())


def _is_number(tensor: Tensor) -> bool:
    """Whether the tensor is a Python number, such as the adapters' scaling, which takes no memory of the device."""
    return tensor.dim() == 0 and tensor.dtype == torch.float64


def now() -> float:
    """The time in seconds, after all work on the device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


# -- the allocations of a real step ------------------------------------------------------------------------------------


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
