"""The adapter layers inside a model, by their names in the base model."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.vblora.layer import VBLoRALayer
from peft.tuners.vera.layer import VeraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from weightlora.errors import OptionError
from weightlora.model.gathering import loaded
from weightlora.model.modules import base_of


class SortedLoraConfig(LoraConfig):
    """A ``LoraConfig`` whose sets are saved as sorted lists; in memory they stay sets, which PEFT's operations need.

    PEFT saves a set in random order, and ``add_weighted_adapter`` takes names only as a set.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as PEFT does, with sorted lists in place of sets."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, LoraLayer]:
    """Return the layers of ``model`` that carry ``adapter``, by their name in the base model, sorted.

    Adapters of single parameters (``target_parameters``) are left out.

    Args:
        model: A PEFT model, or any module that PEFT has put LoRA layers into.
        adapter: The adapter's name.
    """
    return {name: m for name, m in adapter_layers(model, adapter).items() if isinstance(m, LoraLayer)}


def adapter_layers(model: nn.Module, adapter: str = "default") -> dict[str, BaseTunerLayer]:
    """Return what :func:`lora_layers` returns, and the layers of PEFT's VeRA and VB-LoRA; all have ``r`` by adapter."""
    found = {name: m for name, m in base_of(model).named_modules() if _carries(m, adapter)}
    return dict(sorted(found.items()))


def adapter_ranks(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """Return the rank of every layer or parameter that carries ``adapter``, by its name in the base model."""
    kinds = (LoraLayer, VeraLayer, VBLoRALayer)
    modules = base_of(model).named_modules()
    found = {_adapted(name, m): m.r[adapter] for name, m in modules if isinstance(m, kinds) and adapter in m.r}
    return dict(sorted(found.items()))


def _carries(module: nn.Module, adapter: str) -> TypeGuard[BaseTunerLayer]:
    """Whether ``module`` is a linear layer with ``adapter``: no embedding, and no wrapper of a parameter."""
    if isinstance(module, LoraLayer):
        return not isinstance(module, ParamWrapper) and adapter in module.lora_A
    return isinstance(module, VeraLayer | VBLoRALayer) and adapter in module.r


def _adapted(name: str, module: object) -> str:
    """What a PEFT layer adapts: the layer of its name, or a parameter of it; PEFT nests the wrappers of parameters."""
    if not isinstance(module, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{module.parameter_name}"


def without_adapters(model: nn.Module) -> nn.Module:
    """Take the adapters off a PEFT model and return its base model; return any other model unchanged."""
    if not isinstance(model, PeftModel):
        return model
    tuner: Any = model.base_model
    return tuner.unload() if isinstance(tuner, BaseTuner) else model.get_base_model()


def take_tuner(model: PeftModel, other: PeftModel) -> None:
    """Give ``model`` the adapters of ``other``; it stays the same object, which trainers and callbacks refer to."""
    model.base_model = other.base_model
    model.set_adapter("default")


@contextmanager
def unchecked_patterns() -> Generator[None]:
    """Ignore PEFT's warning that keys of a pattern match no module, and one that is for PEFT itself, for the block.

    PEFT does not look among ``target_parameters``. :func:`weightlora.find_sites` and ``AdapterPlan.check`` do.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield


def require_peft_wrapper(model: nn.Module) -> None:
    """Raise where adapters are inside a model that is no ``PeftModel``: nothing says how to take them off.

    Raises:
        OptionError: With one of the layers.
    """
    if isinstance(model, PeftModel):
        return
    inside = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if inside:
        raise OptionError(
            f"{type(model).__name__} carries adapters without being a PeftModel ({inside[0]} and {len(inside) - 1} "
            "more); give the model before add_adapter() or inject_adapter_in_model()"
        )


def require_replaceable(model: PeftModel, advice: str) -> LoraConfig:
    """Return the config of a PEFT model whose adapters can be replaced: nothing is lost, for nothing was trained.

    Args:
        model: A PEFT model.
        advice: What to do instead, for the end of the error.

    Raises:
        OptionError: It has no LoRA named "default", or an adapter or a module trained whole has been trained.
    """
    config = model.peft_config.get("default")
    if not isinstance(config, LoraConfig):
        raise OptionError(f"the model has adapters {', '.join(model.peft_config)}, no LoRA named 'default'; {advice}")
    trained = next(_trained(model.get_base_model()), None)
    if trained is not None:
        raise OptionError(
            f"{trained}: it was trained, or its initialisation ({config.init_lora_weights!r}) rewrote the base; merge "
            f"it, or {advice}"
        )
    return config


def _trained(base: nn.Module) -> Iterator[str]:
    """Each adapter and each module trained whole that is not as PEFT initialises it, and how it differs."""
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            yield from (
                f"B of {name} (adapter {key!r}) is not zero" for key, b in _zeros(module) if not b.is_meta and b.any()
            )
        elif isinstance(module, TrainableTokensLayer | ModulesToSaveWrapper):
            yield from (
                f"{name} (adapter {key!r}) differs from the base model's"
                for key, copy, before in _copies(module)
                if not copy.is_meta and not copy.to(before).equal(before)
            )


def _zeros(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of each adapter of a LoRA layer that start at zero: B with its bias, or A of an embedding."""
    for adapter, b in layer.lora_B.items():
        yield from ((adapter, parameter.detach()) for parameter in b.parameters())
    yield from ((adapter, a.detach()) for adapter, a in layer.lora_embedding_A.items())


def _copies(module: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors of each adapter that start as copies of the base model's, with these."""
    if isinstance(module, TrainableTokensLayer):
        for adapter, rows in module.trainable_tokens_delta.items():
            originals: Any = module.trainable_tokens_original
            yield adapter, rows.detach(), originals[adapter]
        return
    with ExitStack() as parts:
        for part in module.original_module.modules():
            parts.enter_context(loaded(part))
        before = module.original_module.state_dict()
        for adapter, copy in module.modules_to_save.items():
            yield from ((adapter, value, before[key]) for key, value in copy.state_dict().items() if key in before)
