"""Full fine-tuning of all weights, without a budget: the reference of the paper's Table 1.

At a site ΔW itself is trained, from zero: LoRA of full rank, ΔW = B·I where out ≥ in and I·A where out < in. The other
modules with weights are PEFT's ``modules_to_save``. So it ends as stock LoRA like all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from weightlora.errors import OptionError
from weightlora.methods.base import ExpandedMethod, Start, uniform_plan
from weightlora.model.layers import lora_layers
from weightlora.model.sites import Site, trained_modules

if TYPE_CHECKING:
    from peft import PeftModel

    from weightlora.plan.plan import AdapterPlan

#: Fields of a LoraConfig that full fine-tuning has no use for.
_OF_ADAPTERS = ("lora_dropout", "bias")


class Full(ExpandedMethod):
    """Full fine-tuning; of the LoRA config it uses the sites and the head, not the rank."""

    def _planned(self, start: Start) -> AdapterPlan:
        require_trainable(start.model)
        sites = carriers(start.model, start.sites)
        plan = uniform_plan(replace(start, sites=sites), r=start.lora.r, alpha=start.lora.r, rule="full")
        ranks = [min(site.in_features, site.out_features) for site in sites]
        entries = [replace(entry, r=r, alpha=r) for entry, r in zip(plan.entries, ranks, strict=True)]
        fields = {name: value for name, value in plan.lora.items() if name not in _OF_ADAPTERS}
        whole = modules_with_weights(start.model, {site.name for site in sites}, trained_modules(start.lora))
        if whole:
            fields["modules_to_save"] = [*fields.get("modules_to_save", ()), *whole]
        if _has_bias(start.model, sites[0]):
            fields["lora_bias"] = True
        return replace(plan, entries=tuple(entries), lora=fields)

    def _put(self, start: Start) -> PeftModel:
        with _tied_copies_allowed():
            attached = self._plan.attach(start.model)
        self._change(lora_layers(attached))
        tie_copies(attached)
        return attached

    def _change(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            if a.weight.shape[0] == a.weight.shape[1]:
                frozen = a
            else:
                frozen = b
                nn.init.zeros_(a.weight)  # the trained one of the two starts at zero
            register_parametrization(frozen, "weight", Identity(frozen.weight))
            if b.bias is not None:
                nn.init.zeros_(b.bias)

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of full rank, with all other modules in ``modules_to_save``."""
        with _tied_copies_allowed():
            return super().export(model)


build = Full


def require_trainable(model: nn.Module) -> None:
    """Raise where a weight is quantised, or belongs to the model itself, which PEFT cannot save as a module.

    Raises:
        OptionError: With the weight.
    """
    for name, parameter in model.named_parameters():
        if "." not in name:
            raise OptionError(f"full cannot train {name}, which belongs to no module of the model; take another method")
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise OptionError(
                f"full trains all weights, and {name} is quantised ({type(parameter).__name__}, {kind}); load the "
                "model without load_in_4bit and load_in_8bit, or take another method"
            )


def carriers(model: nn.Module, sites: Collection[Site]) -> list[Site]:
    """Return the sites whose ΔW LoRA can carry; the others are trained whole, as all other modules are.

    LoRA has a bias at all of its layers or at none: where some sites have one, those without are the carriers. A site
    inside a module with weights of its own is trained with it.

    Raises:
        OptionError: None is left.
    """
    owners = {name for name, module in model.named_modules() if _owns(module)}
    outer = [site for site in sites if not _is_within(site.name.rpartition(".")[0], owners)]
    biased = [site for site in outer if _has_bias(model, site)]
    found = biased if len(biased) == len(outer) else [site for site in outer if site not in biased]
    if not found:
        raise OptionError("full needs a linear layer outside of modules with parameters of their own; there is none")
    return found


def modules_with_weights(model: nn.Module, carried: Collection[str], whole: Collection[str]) -> list[str]:
    """Return the modules that hold parameters, outermost first, but for those named.

    Args:
        model: The base model.
        carried: Names of sites with an adapter.
        whole: Ends of names of modules that PEFT trains whole already.
    """
    ends = tuple(f".{name}" for name in whole)
    found = {name for name, _ in model.named_modules() if f".{name}".endswith(ends)} if ends else set[str]()
    names: list[str] = []
    for name, module in model.named_modules():
        if _owns(module) and name not in carried and not _is_within(name, found):
            found.add(name)
            names.append(name)
    return names


def tie_copies(model: nn.Module) -> None:
    """Let the trained copies of weights that modules share be shared, too, such as of embeddings and output head."""
    first: dict[int, nn.Parameter] = {}
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        copy = wrapper.modules_to_save["default"]
        for name, original in wrapper.original_module.named_parameters():
            path, _, last = name.rpartition(".")
            owner = copy.get_submodule(path)
            setattr(owner, last, first.setdefault(id(original), copy.get_parameter(name)))


def _is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of ``modules``, or inside one."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts) + 1))


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _has_bias(model: nn.Module, site: Site) -> bool:
    return any(name == "bias" for name, _ in model.get_submodule(site.name).named_parameters(recurse=False))


@contextmanager
def _tied_copies_allowed() -> Generator[None]:
    """Ignore PEFT's warning that copies of tied weights part: :func:`tie_copies` ties them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Model has `tie_word_embeddings=True`")
        yield


class Identity(nn.Module):
    """A weight that is always the identity.

    Args:
        like: A square matrix of the same size, device and type.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.eye: Tensor
        self.register_buffer("eye", torch.eye(len(like), device=like.device, dtype=like.dtype))

    def forward(self, unused: Tensor) -> Tensor:
        """(1, 1) → (r, r), in the number type of the adapters."""
        return self.eye.to(unused.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return one unused number: PEFT takes an empty matrix for a lost shard."""
        return weight.new_zeros(1, 1)
