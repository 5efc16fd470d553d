"""Skip the blocks below the lowest adapter: what enters it is computed once for each row, and read back afterwards.

Below the floor nothing is trained, so that a row has the same hidden states there in every epoch. While a model trains,
its lower blocks are replaced for the length of a forward pass by modules that return the stored states. Rows that are
not stored are computed first, by a forward pass that ends at the floor. Nothing of it is in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora.errors import OptionError
from weightlora.model._offload import Offload
from weightlora.model.hidden_store import NOT_READ, HiddenStore, assembled, read_tensors, rows_of, tokens_of
from weightlora.model.modules import base_of
from weightlora.model.restore import evaluated


@dataclass(frozen=True)
class Floor:
    """The blocks of a model, and how many of them lie below the lowest trained parameter."""

    name: str
    """Of the list of blocks."""
    blocks: nn.ModuleList
    below: int

    @property
    def text(self) -> str:
        """The floor in words."""
        return f"{self.below} of {len(self.blocks)} blocks of {self.name}"


def find_floor(model: nn.Module) -> Floor:
    """Return the first stack of blocks that the model has, and how many of its blocks nothing is trained in or below.

    Raises:
        OptionError: The model is none of transformers' with blocks, or its lowest block is trained.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
        >>> find_floor(get_peft_model(base, LoraConfig(target_modules=["layers.2.self_attn.q_proj"]))).text
        '2 of 3 blocks of model.layers'
    """
    name, blocks = find_blocks(model)
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    below = trained.index(True) if any(trained) else len(blocks)
    if below == 0:
        raise OptionError(
            f"the lowest block of {name} is trained, so that nothing below it could be stored; select with "
            "time=0.6 and store=True (store_frozen in a recipe), or give target_modules of upper layers"
        )
    return Floor(name, blocks, below)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the first stack of blocks that the model has, and its name in the base model.

    Raises:
        OptionError: The model is none of transformers' with blocks.
    """
    for name, module in base_of(model).named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_block, module)):
            return name, module
    raise OptionError(f"{type(base_of(model)).__name__} has no list of transformers' blocks; train it without a store")


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


class _ReachedError(Exception):
    """Ends a forward pass at the floor."""


class _Stored(nn.Module):
    """Stands for a block below the floor: it returns what enters the floor."""

    def __init__(self, prefix: FrozenPrefix, block: nn.Module) -> None:
        super().__init__()
        # What the model asks of a block beside calling it, such as its kind of attention.
        vars(self).update({key: value for key, value in vars(block).items() if not key.startswith("_")})
        vars(self)["_prefix"] = prefix

    def forward(self, *_: Any, **__: Any) -> Any:
        prefix: FrozenPrefix = vars(self)["_prefix"]
        return prefix.output


class FrozenPrefix:
    """The blocks below the floor of a model that trains.

    Args:
        model: A PEFT model, or any model of transformers.
        store: Where hidden states are kept.
        dropout_off: Run what lies below the floor as in evaluation.

    Raises:
        OptionError: See :func:`find_floor`.
    """

    def __init__(self, model: nn.Module, store: HiddenStore, *, dropout_off: bool = False) -> None:
        self.floor = find_floor(model)
        self.store, self.dropout_off = store, dropout_off
        self.splits = False
        """Whether packed rows are known one by one: they do not see each other."""
        self.always = False
        """Use the store in evaluation as well."""
        self.offload: Offload | None = None
        """The weights below the floor, where they leave the device."""
        self.is_filled = False
        """Whether rows are expected to be stored, so that these weights are not needed."""
        self.hits = self.misses = 0
        self.inputs: Mapping[str, Any] = {}
        """What the model was last called with in evaluation."""
        self.output: Any = None
        self._depth, self._captured, self._below = 0, None, list[nn.Module]()
        self._others: tuple[Any, ...] | None = None
        """What the last block below passes on beside hidden states, in a tuple."""
        self._dtype = torch.float32
        self._originals: list[nn.Module] = list(self.floor.blocks)[: self.floor.below]
        self._stand_ins = [_Stored(self, block) for block in self._originals]
        self._model = base_of(model)
        tuner = dict(model.named_children()).get("base_model", self._model)  # which PEFT calls depends on the task
        self._called = tuple(dict.fromkeys((tuner, self._model)))
        self._handles: list[RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """From now on use the store while the model trains."""
        self._handles = [
            handle
            for module in self._called
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            )
        ]

    def remove(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        self._come_back()

    def offload_below(self) -> None:
        """From now on let the weights below the floor leave the device while all rows are stored.

        Raises:
            OptionError: See :class:`Offload`.
        """
        self.offload = Offload(self._model, self._originals)

    def _come_back(self) -> None:
        if self.offload is not None:
            self.offload.come_back()

    def find_below(self, inputs: Mapping[str, Any]) -> list[str]:
        """Run the model up to the floor, note what lies below it, and return the trained modules among that."""
        executed: dict[str, nn.Module] = {}
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                note = _noting(executed, name, module)
                stack.callback(module.register_forward_pre_hook(note).remove)
            output = self.compute(inputs)
        self._dtype, self.splits = hidden_of(output).dtype, self._are_apart(inputs, hidden_of(output))
        self._others = output[1:] if isinstance(output, tuple) else None
        upper = set(map(id, list(self.floor.blocks)[self.floor.below :])) | {id(self.floor.blocks)}
        parts = {
            name: module for name, module in executed.items() if not any(id(each) in upper for each in module.modules())
        }
        around = {id(each) for block in self._originals for each in block.modules()}
        self._below = [module for module in parts.values() if id(module) not in around] + self._originals
        return [name for name, part in parts.items() if any(p.requires_grad for p in part.parameters())]

    def _are_apart(self, inputs: Mapping[str, Any], hidden: Tensor) -> bool:
        """Whether rows that are packed together have the hidden states that each has alone."""
        read = read_tensors(inputs)
        packed = [row for row in rows_of(read, split=True) if row.place != slice(None)]
        if "attention_mask" in read or len(packed) < 2:
            return False
        last, tokens = packed[-1], tokens_of(read)
        line = slice(last.index, last.index + 1)
        alone = {
            name: value[line, last.place] if value.dim() > 1 and value.shape[1] == tokens else value
            for name, value in read.items()
        }
        own = hidden_of(self.compute(alone))[0]
        return bool(torch.allclose(own, hidden[last.index, last.place].to(own.dtype), rtol=1e-2, atol=1e-3))

    def compute(self, inputs: Mapping[str, Any]) -> Any:
        """Return what the last block below the floor makes of a batch, as the model passes it on."""
        self._come_back()
        last = self._originals[-1]
        handle = last.register_forward_hook(self._capture)
        below = self._below if self.dropout_off else []
        self._depth += 1
        try:
            with torch.no_grad(), evaluated(*below), suppress(_ReachedError):
                self._model(**{name: value for name, value in inputs.items() if name not in NOT_READ})
        finally:
            self._depth -= 1
            handle.remove()
        found, self._captured = self._captured, None
        return found

    def _capture(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._captured = output
        raise _ReachedError

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if args:
            raise OptionError("the model was called with positional arguments; a store needs them by name")
        if not (module.training or self.always):
            self.inputs = kwargs
            self._come_back()
            return
        self.output = self._output_of(kwargs)
        for i, stand_in in enumerate(self._stand_ins):
            self.floor.blocks[i] = stand_in

    def _after(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self.output is not None:
            for i, block in enumerate(self._originals):
                self.floor.blocks[i] = block
            self.output = None

    def _output_of(self, inputs: Mapping[str, Any]) -> Any:
        """What enters the floor: read back, or computed for the rows that are not stored."""
        read = read_tensors(inputs)
        rows = rows_of(read, split=self.splits)
        found = [self.store.get(row.key) for row in rows]
        missing = [i for i, value in enumerate(found) if value is None]
        self.hits += len(rows) - len(missing)
        self.misses += len(missing)
        if missing:
            lines = sorted({rows[i].index for i in missing})
            count = len(next(iter(read.values())))
            some = {
                name: value[lines] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
                for name, value in inputs.items()
            }
            hidden = hidden_of(self.compute(some if len(lines) < count else inputs))
            for i in missing:
                own = hidden[lines.index(rows[i].index), rows[i].place]
                self.store.put(rows[i].key, own)
                found[i] = own
        elif self.offload is not None and self.is_filled:
            self.offload.leave()
        device = next(iter(read.values())).device
        whole = assembled([value.to(device, self._dtype) for value in found if value is not None], rows, read)
        return whole if self._others is None else (whole, *self._others)


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states that a block passes on.

    Raises:
        OptionError: It passes on something else beside them.
    """
    if isinstance(output, Tensor):
        return output
    others = output[1:] if isinstance(output, tuple) else (0,)
    if any(isinstance(each, Tensor) for each in others) or not isinstance(output, tuple):
        raise OptionError("its blocks pass on more than hidden states, which a store does not hold; train without one")
    return output[0]


def _noting(executed: dict[str, nn.Module], name: str, module: nn.Module) -> Any:
    def note(*_: Any) -> None:
        executed[name] = module

    return note
