"""Whether a model has weights that an adapter can be trained on."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from weightlora.errors import SiteError
from weightlora.model.distributed import is_first

if TYPE_CHECKING:
    from torch import Tensor, nn


def require_loaded(model: nn.Module, *, warm_up: bool = False) -> None:
    """Raise where a weight has no values or no shape, or is one through which no gradient passes.

    Such are weights on the meta device, of lazy modules, made under ``torch.inference_mode()``, and 4-bit weights that
    bitsandbytes packed for evaluation.

    Args:
        model: A base model or a PEFT model.
        warm_up: The model computes at once, on every process, also with its buffers. Otherwise processes other than
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
    from torch.nn.parameter import is_lazy

    tensors = dict(chain(model.named_parameters(), model.named_buffers() if warm_up else ()))
    later = _offloaded(model)
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise SiteError(
            f"{lazy[0]} ({len(lazy)} of {len(tensors)} weights) has no shape yet, as lazy modules have none before "
            "their first batch: run the model on a batch once"
        )
    empty = [name for name, tensor in tensors.items() if tensor.is_meta and id(tensor) not in later]
    if empty and (warm_up or is_first()):
        raise SiteError(
            f"{empty[0]} ({len(empty)} of {len(tensors)} weights) is on the meta device and nothing loads it: load the "
            "model's weights, such as with from_pretrained and without torch.device('meta')"
        )
    frozen = [name for name, tensor in tensors.items() if tensor.is_inference()]
    if frozen:
        raise SiteError(
            f"{frozen[0]} ({len(frozen)} of {len(tensors)} weights) was made under torch.inference_mode(), which "
            "autograd cannot use: load the model outside of that block"
        )
    packed = [name for name, weight in model.named_parameters() if _is_packed(weight)]
    if packed:
        raise SiteError(
            f"{packed[0]} ({len(packed)} of {len(tensors)} weights) was packed by bitsandbytes when the model was "
            "evaluated on the CPU, and no gradient passes it: load the model again, and evaluate it afterwards"
        )


def _is_packed(weight: Tensor) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight for evaluation on a CPU."""
    state = vars(weight).get("quant_state")
    return state is not None and bool(vars(state).get("packing_format_for_cpu"))


def _offloaded(model: nn.Module) -> set[int]:
    """The tensors that a hook of accelerate loads whenever their module runs."""
    from accelerate.utils import has_offloaded_params

    parts = [module for module in model.modules() if has_offloaded_params(module)]
    return {id(t) for part in parts for t in chain(part.parameters(recurse=False), part.buffers(recurse=False))}
