"""Where a model's weights are: in memory, only while their module runs, or nowhere yet.

``device_map`` and ``cpu_offload`` leave parameters on the meta device, and a hook of accelerate loads them for each
forward pass of the module. DeepSpeed's ``zero.Init`` leaves empty tensors, and gathers them only in training.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weightlora.errors import OptionError, SiteError
from weightlora.model.distributed import is_first
from weightlora.model.torch_private import Observer

if TYPE_CHECKING:
    from peft import LoraConfig

#: Initialisations that read no weights of the base model.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
#: What accelerate sets on a module whose weights it loads.
_HOOK = ("_hf_hook", "_old_forward", "forward")


def require_loaded(model: nn.Module, *, computes: bool = False) -> None:
    """Raise where a weight has no values or no shape, or is one through which no gradient passes.

    Such are weights on the meta device, of lazy modules, made under ``torch.inference_mode()``, and 4-bit weights that
    bitsandbytes packed for evaluation.

    Args:
        model: A base model or a PEFT model.
        computes: The model computes at once, on every process, also with its buffers. Otherwise processes other than
            the first may lack the values, which FSDP's cpu_ram_efficient_loading gives them when the training starts.

    Raises:
        SiteError: With one of the weights, and what to do.

    Example:
        >>> from torch import nn
        >>> require_loaded(nn.Linear(2, 2))
        >>> require_loaded(nn.Linear(2, 2, device="meta"))
        Traceback (most recent call last):
        ...
        weightlora.errors.SiteError: weight (2 of 2 weights) is on the meta device and nothing loads it: load the \
model's weights, such as with from_pretrained and without torch.device('meta')
    """
    tensors = dict(chain(model.named_parameters(), model.named_buffers() if computes else ()))
    parts = [
        module for module in model.modules() if has_offloaded_params(module)
    ]  # accelerate loads them when they run
    later = {id(t) for part in parts for t in chain(part.parameters(recurse=False), part.buffers(recurse=False))}
    must_be_here = computes or is_first()
    faults: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
        (
            is_lazy,
            "has no shape yet, as lazy modules have none before their first batch: run the model on a batch once",
        ),
        (
            lambda tensor: must_be_here and tensor.is_meta and id(tensor) not in later,
            "is on the meta device and nothing loads it: load the model's weights, such as with from_pretrained and "
            "without torch.device('meta')",
        ),
        (
            Tensor.is_inference,
            "was made under torch.inference_mode(), which autograd cannot use: load the model outside of that block",
        ),
        (
            _is_packed,
            "was packed by bitsandbytes when the model was evaluated on the CPU, and no gradient passes it: load the "
            "model again, and evaluate it afterwards",
        ),
    )
    for is_wrong, what in faults:
        wrong = [name for name, tensor in tensors.items() if is_wrong(tensor)]
        if wrong:
            raise SiteError(f"{wrong[0]} ({len(wrong)} of {len(tensors)} weights) {what}")


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of ``model`` on the CPU or disk until a module runs.

    Example:
        >>> is_offloaded(nn.Linear(2, 2))
        False
    """
    return any(map(has_offloaded_params, model.modules()))


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned weights of ``model``."""
    return partitioned_dtype(model) is not None


def partitioned_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the type that ZeRO-3 holds the weights of ``model`` in; None where it has partitioned none."""
    return next((p.dtype for p in model.parameters() if "ds_id" in vars(p)), None)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter that has numbers; the CPU where none has.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@contextmanager
def loaded(module: nn.Module) -> Generator[None]:
    """Have the weights of ``module`` itself in memory for the length of the block; changes of them are lost.

    Example:
        >>> from accelerate import cpu_offload
        >>> (layer,) = cpu_offload(nn.Sequential(nn.Linear(2, 2)), execution_device=torch.device("cpu"))
        >>> with loaded(layer):
        ...     layer.weight.device
        device(type='cpu')
        >>> layer.weight.device
        device(type='meta')
    """
    if _is_partitioned(module):
        with _collected(module):
            yield
    elif has_offloaded_params(module) and any(p.is_meta for p in module.parameters(recurse=False)):
        with align_module_device(module):
            yield
    else:
        yield


@contextmanager
def gathered(model: nn.Module) -> Generator[None]:
    """Have the weights of each module in memory while it runs, and again when its backward pass needs them.

    Autograd keeps a frozen weight from the forward to the backward pass, which would put the whole model into memory.
    Here it keeps the module and the weight's name, and the weight is loaded a second time. Where all weights of
    ``model`` are in memory, nothing changes.

    Example:
        >>> from accelerate import cpu_offload
        >>> net = cpu_offload(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), execution_device="cpu")
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> with gathered(net):
        ...     net(x).sum().backward()
        >>> x.grad.shape
        torch.Size([1, 2])
    """
    parts = [module for module in model.modules() if has_offloaded_params(module) or _is_partitioned(module)]
    running: list[tuple[nn.Module, ExitStack]] = []

    def begin(module: nn.Module) -> None:
        stack = ExitStack()
        running.append((module, stack))
        if _is_partitioned(module):  # accelerate's hooks load the others
            stack.enter_context(loaded(module))

    def end() -> None:
        running.pop()[1].close()

    def pack(tensor: Tensor) -> Tensor | _View:
        return next(_views(running[-1][0], tensor), tensor) if running else tensor

    with ExitStack() as hooks:
        for module in parts:
            hooks.callback(module.register_forward_pre_hook(Observer(partial(begin, module)), prepend=True).remove)
            hooks.callback(module.register_forward_hook(Observer(end), always_call=True).remove)
        if parts:
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _unpack))
        yield


@contextmanager
def ready_for_adapters(model: nn.Module, whole: Sequence[str]) -> Generator[None]:
    """Let PEFT wrap offloaded layers as it wraps others: it puts adapters where it finds the weight of the layer.

    That is the meta device, on which adapters have no numbers. For the length of the block an offloaded weight is a
    placeholder on the device where its layer runs, which takes no memory. Modules that PEFT copies, to train them
    whole, are loaded and have no hooks.

    Args:
        model: A model without adapters.
        whole: The names in ``modules_to_save``, and the task's head.
    """
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if not has_offloaded_params(module):
                continue
            if _is_copied(name, whole):
                undo.enter_context(loaded(module))
                hook = {key: vars(module).pop(key) for key in _HOOK}
                undo.callback(vars(module).update, hook)
            else:
                for key, parameter in list(module.named_parameters(recurse=False)):
                    placeholder = _placeholder(parameter, vars(module)["_hf_hook"].execution_device)
                    setattr(module, key, placeholder)
                    undo.callback(_put_back, module, key, parameter)
        yield


def require_loadable(model: nn.Module) -> None:
    """Raise unless every offloaded weight of ``model`` is loaded when its own module runs.

    Raises:
        OptionError: Accelerate loads it with a module above.
    """
    for name, module in model.named_modules():
        if has_offloaded_params(module) and vars(module)["_hf_hook"].place_submodules:
            raise OptionError(
                f"{name} is offloaded as a whole (preload_module_classes), and cannot hold adapters; leave "
                "preload_module_classes out"
            )


def why_not_attachable(model: nn.Module, lora: LoraConfig) -> str | None:
    """Why adapters of ``lora`` cannot be put on ``model`` while it is offloaded; None where they can."""
    fields = [f"init_lora_weights={lora.init_lora_weights!r}"] * (lora.init_lora_weights not in _PLAIN_STARTS)
    fields += ["use_dora=True"] * bool(lora.use_dora)
    if fields and is_offloaded(model):
        return (
            f"{fields[0]} reads the base weights, which are offloaded; attach the plan to the model loaded without "
            f"offloading, or leave {fields[0].partition('=')[0]} out"
        )
    return None


def _is_packed(weight: Tensor) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight for evaluation on a CPU."""
    state = vars(weight).get("quant_state")
    return state is not None and bool(vars(state).get("packing_format_for_cpu"))


@dataclass(frozen=True)
class _View:
    """Where a weight is that autograd asked to keep: a view of a parameter."""

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """From the parameter's first number."""

    def load(self) -> Tensor:
        with loaded(self.module):
            weight: Tensor = getattr(self.module, self.name).detach()
            return weight.as_strided(self.size, self.stride, weight.storage_offset() + self.offset)


def _views(module: nn.Module, tensor: Tensor) -> Iterator[_View]:
    """The place of ``tensor`` where it is a view of a parameter of ``module`` itself."""
    for name, p in module.named_parameters(recurse=False):
        offset = tensor.data_ptr() - p.data_ptr()
        if tensor.device == p.device and tensor.dtype == p.dtype and 0 <= offset < p.nbytes:
            yield _View(module, name, tensor.size(), tensor.stride(), offset // p.element_size())


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.load() if isinstance(kept, _View) else kept


@contextmanager
def _collected(module: nn.Module) -> Generator[None]:
    """Give a partitioned module whole parameters of its own for the length of the block.

    DeepSpeed would empty the gathered ones afterwards, also where checkpointing still holds them.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]

    parts = dict(module.named_parameters(recurse=False))
    with deepspeed.zero.GatheredParameters(list(parts.values())):
        whole = {name: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for name, p in parts.items()}
    try:
        for name, parameter in whole.items():
            setattr(module, name, parameter)
        yield
    finally:
        for name, parameter in parts.items():
            setattr(module, name, parameter)


def _is_partitioned(module: nn.Module) -> bool:
    return any("ds_id" in vars(parameter) for parameter in module.parameters(recurse=False))


def _is_copied(name: str, whole: Sequence[str]) -> bool:
    """Whether PEFT copies the module or one above it: it matches ends of names."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(end) for i in range(len(parts)) for end in whole)


def _placeholder(parameter: Tensor, device: Any) -> nn.Parameter:
    zero = torch.zeros((), dtype=parameter.dtype, device=device)
    return nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad)


def _put_back(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parameter.requires_grad_(getattr(module, name).requires_grad)  # PEFT freezes the base
    setattr(module, name, parameter)
