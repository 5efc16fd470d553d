"""The layers of a model that can carry a LoRA adapter; what is skipped, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, SiteError
from weightlora.model.modules import (
    base_modules,
    base_of,
    is_linear,
    output_head,
    read_by_peft,
    refused_layers,
    require_adaptable_parameters,
    require_patterns,
    shape_of,
    unmatched_targets,
    warn_of_leftovers,
)
from weightlora.text import similar

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

#: Modules that PEFT trains whole for a task type, in addition to ``modules_to_save``.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
#: transformers' loader for each of PEFT's task types; transformers is not imported here.
LOADERS: Mapping[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_NEVER_CALLED = "inside nn.MultiheadAttention, which never calls it"
_HEAD_NAMES = frozenset([*(name for names in TASK_HEADS.values() for name in names), "classification_head"])


def block_of(name: str) -> str:
    """Return the repeated layer that a module or parameter is in: the name up to its first number; empty without one.

    Example:
        >>> block_of("model.layers.3.self_attn.q_proj"), block_of("lm_head")
        ('model.layers.3', '')
    """
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match.group() if match else ""


@dataclass(frozen=True, order=True)
class Site:
    """A linear layer that may carry an adapter.

    Example:
        >>> site = Site("model.layers.3.self_attn.q_proj", in_features=64, out_features=32)
        >>> site.block, site.projection, site.parameters(r=8)
        ('model.layers.3', 'self_attn.q_proj', 768)
    """

    name: str
    """Full dotted module name in the base model; it identifies the adapter."""
    in_features: int
    out_features: int

    @property
    def block(self) -> str:
        """The repeated layer, by :func:`block_of`."""
        return block_of(self.name)

    @property
    def projection(self) -> str:
        """The name inside the block, the same in every layer."""
        return self.name[len(self.block) :].lstrip(".")

    def parameters(self, r: int, *, vectors: int = 0) -> int:
        """Trainable parameters of an adapter of rank ``r``: A is (r, in), B is (out, r).

        Args:
            r: The rank; an adapter of rank 0 has no parameters.
            vectors: Further vectors of ``out_features`` numbers that an adapter has: DoRA's magnitude, B's bias.
        """
        return r * (self.in_features + self.out_features) + (vectors * self.out_features if r else 0)


@dataclass(frozen=True, order=True)
class TargetParameter:
    """A parameter with an adapter of its own (``target_parameters``), such as fused experts. Its rank never changes.

    Example:
        >>> TargetParameter("layers.0.mlp.experts.down_proj", shape=(4, 16, 8), r=2, alpha=4).parameters
        192
    """

    name: str
    """Full dotted name in the base model."""
    shape: tuple[int, ...]
    """(rows, columns), or (experts, rows, columns)."""
    r: int
    """Rank of each expert's adapter."""
    alpha: float
    """``lora_alpha``."""

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapter: r·(rows + columns) for each expert."""
        *experts, rows, columns = self.shape
        return self.r * math.prod(experts) * (rows + columns)


@dataclass(frozen=True)
class Skipped:
    """A linear layer, or a module or name that ``target_modules`` asks for, that carries no adapter, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Candidates:
    """What :func:`find_sites` returns, each part sorted by name."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    parameters: tuple[TargetParameter, ...] = ()
    """What PEFT adapts besides: ``target_parameters``, or fused experts that ``target_modules`` names."""


def find_sites(model: nn.Module, lora: LoraConfig | None = None) -> Candidates:
    """List the linear layers of ``model`` that ``lora`` would adapt, sorted by name, and what is skipped, with reasons.

    PEFT's own rule matches the names: ``target_modules``, ``exclude_modules``, ``layers_to_transform``,
    ``modules_to_save``. With ``target_modules=None`` every linear layer is a candidate except the output head and the
    pooler; ``"all-linear"`` includes the pooler.

    Skipped are all other linear layers, and modules of other kinds that ``target_modules`` names, such as embeddings.
    Skipped with a warning are layers on which PEFT puts no adapter: Mamba's
    ``out_proj``, routers that return a tuple, and layers whose names transformers gives to fused experts.

    Fused experts are no candidates: they are one parameter. Those that ``target_parameters`` or ``target_modules`` name
    are listed in ``parameters``, with PEFT's ranks.

    Args:
        model: A transformers model, a PEFT model (its base is searched) or any module with linear layers.
        lora: The wanted adapters; None means ``LoraConfig()``.

    Raises:
        SiteError: There is no linear layer, a name in ``target_modules`` matches none (the text names the closest),
            PEFT cannot adapt one of ``target_parameters``, or the model is compiled or inside ``DataParallel``.
        OptionError: ``lora`` is no ``LoraConfig``, PEFT adapts no parameter under it, or ``target_modules`` names a
            part of a fused one.

    Warns:
        WeightLoraWarning: ``target_modules`` asks for a module that gets no adapter, or a name in ``exclude_modules``,
            ``rank_pattern`` or ``alpha_pattern`` matches nothing.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [site.name for site in find_sites(model).sites]
        ['0', '2']
    """
    from peft import LoraConfig

    lora = LoraConfig() if lora is None else lora
    if not isinstance(lora, LoraConfig):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's mistake
        raise OptionError(f"lora is of type {type(lora).__name__}; give a peft.LoraConfig, such as LoraConfig(r=8)")
    require_patterns(lora)
    modules = all_modules(model)
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    if not linear:
        raise SiteError(f"{type(model).__name__} has no linear layer that could carry an adapter")

    read = read_by_peft(modules[""], lora)
    shapes = named_parameters(modules, sorted(read.target_parameters or ()))
    parameters = tuple(TargetParameter(name, shape, *rank_and_alpha(read, name)) for name, shape in shapes.items())

    head = output_head(model)
    reasons = {name: _reason_to_skip(name, layer, lora, head) for name, layer in linear.items()}
    refused = refused_layers(modules[""], {name: linear[name] for name, reason in reasons.items() if reason is None})
    reasons |= refused
    sites = tuple(sorted(Site(name, *shape_of(linear[name])) for name, reason in reasons.items() if reason is None))
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    others = _other_kinds(modules, lora)
    if not sites:
        raise SiteError(_nothing_matched(lora, skipped, others, shapes))
    if parameters:
        require_adaptable_parameters(lora, shapes)
    left_out = {**unmatched_targets(lora, read, modules, linear, shapes), **others, **refused}
    left_out |= {name: reason for name, reason in skipped.items() if reason == _NEVER_CALLED and _is_named(name, lora)}
    warn_of_leftovers(lora, left_out, modules, [site.name for site in sites], shapes)
    return Candidates(sites, tuple(Skipped(*item) for item in sorted({**skipped, **left_out}.items())), parameters)


def linear_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every linear layer of ``model``, candidate or not, sorted by name; PEFT's wrappers are ignored."""
    return tuple(sorted(Site(name, *shape_of(m)) for name, m in all_modules(model).items() if is_linear(m)))


def named_parameters(modules: Mapping[str, nn.Module], entries: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that PEFT adapts for ``target_parameters=entries``, by their full names.

    Args:
        modules: All modules of the base model, by name.
        entries: Full names of parameters, or their endings.

    Raises:
        SiteError: PEFT cannot adapt one of them.
    """
    ends = tuple(f".{entry}" for entry in entries)
    found: dict[str, tuple[int, ...]] = {}
    for module, owner in modules.items():
        for own, parameter in owner.named_parameters(recurse=False):
            name = f"{module}.{own}"
            if name not in entries and not name.endswith(ends):
                continue
            if not module or parameter.ndim not in (2, 3):
                why = f"has {parameter.ndim} dimensions, not 2 or 3" if module else "belongs to the whole model"
                raise SiteError(f"target_parameters: {name.lstrip('.')} {why}, so PEFT cannot adapt it; leave it out")
            found[name] = tuple(parameter.shape)
    return dict(sorted(found.items()))


def require_unwrapped(model: nn.Module) -> None:
    """Raise unless ``model`` is a module with its own names of layers: what wraps it, or compiles it, renames them.

    Raises:
        SiteError: The model is compiled, inside ``DataParallel`` or ``DistributedDataParallel``, or no module.
    """
    from accelerate.utils import is_compiled_module
    from torch import nn

    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's mistake
        raise SiteError(f"the model is of type {type(model).__name__}; give a torch.nn.Module")
    if is_compiled_module(model):
        raise SiteError(
            "the model is compiled, which renames its layers; give the model before torch.compile, and compile it later"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapper = type(model).__name__
        raise SiteError(
            f"the model is inside {wrapper}, which renames its layers; give model.module, and wrap it later"
        )


def rank_and_alpha(lora: LoraConfig, name: str) -> tuple[int, float]:
    """Return ``r`` and ``lora_alpha`` of plain LoRA at the site ``name``, with the config's patterns applied.

    Example:
        >>> from peft import LoraConfig
        >>> rank_and_alpha(LoraConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}), "layers.0.q_proj")
        (4, 16)
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = lora.rank_pattern or {}, lora.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), lora.r)
    return r, alphas.get(get_pattern_key(list(alphas), name), lora.lora_alpha)


def require_uniform(name: str, lora: LoraConfig) -> None:
    """Raise unless ``lora`` is plain s·B·A with the same rank and s = alpha/r at every site.

    Args:
        name: The method that needs it, for the error.
        lora: The user's config.

    Raises:
        OptionError: The config has patterns, rsLoRA, DoRA or a bias.
    """
    if lora.rank_pattern or lora.alpha_pattern or lora.use_dora or lora.use_rslora:
        raise OptionError(f"{name} gives every site the same rank and alpha; leave out patterns, rsLoRA and DoRA")
    if lora.lora_bias:
        raise OptionError(
            f"lora_bias=True is not allowed: {name} trains and exports adapters without bias; leave it out"
        )


def tuner_fields(lora: LoraConfig, sites: Sequence[Site]) -> dict[str, Any]:
    """The fields that PEFT's other configs share with ``LoraConfig``, for adapters on exactly ``sites``."""
    return {
        "task_type": lora.task_type,
        "target_modules": "|".join(re.escape(site.name) for site in sites),
        "fan_in_fan_out": lora.fan_in_fan_out,
        "modules_to_save": list(lora.modules_to_save) if lora.modules_to_save else None,
    }


def adapter_parameters(sites: Sequence[Site], lora: LoraConfig) -> dict[str, int]:
    """Trainable parameters of the adapter that ``lora`` puts on each site, by its name."""
    vectors = output_vectors(lora)
    return {site.name: site.parameters(rank_and_alpha(lora, site.name)[0], vectors=vectors) for site in sites}


def output_vectors(lora: LoraConfig) -> int:
    """How many trained vectors of ``out_features`` numbers each adapter has beside A and B: see :class:`Site`."""
    return int(lora.use_dora) + int(lora.lora_bias)


def trained_modules(lora: LoraConfig) -> tuple[str, ...]:
    """Names of the modules that PEFT trains whole under ``lora``, such as a task head; they are never candidates."""
    task = lora.task_type
    by_task = TASK_HEADS.get(str(task.value if isinstance(task, Enum) else task), ())
    return tuple(dict.fromkeys([*(lora.modules_to_save or ()), *by_task]))


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name in the base model; PEFT's wrappers are ignored."""
    require_unwrapped(base_of(model))
    return dict(base_modules(model))


def _reason_to_skip(name: str, layer: nn.Module, lora: LoraConfig, head: nn.Module | None) -> str | None:
    """Why the layer is skipped, or None for a candidate."""
    from torch import nn

    parts = name.split(".")
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return _NEVER_CALLED
    for module in trained_modules(lora):
        if re.match(rf"(^|.*\.){module}($|\..*)", name):
            return f"trained whole ({module!r} in modules_to_save)"
    if lora.target_modules is None or _is_all_linear(lora):
        if layer is head or not _HEAD_NAMES.isdisjoint(parts):
            return "output head"
        if lora.target_modules is None and "pooler" in parts:
            return "pooler (name it in target_modules to make it a candidate)"
        targets, otherwise = [parts[-1]], "not in layers_to_transform"
    else:
        targets, otherwise = lora.target_modules, "not in target_modules"
    if _matches(lora, name, targets, lora.exclude_modules):
        return None
    return "in exclude_modules" if _matches(lora, name, targets, None) else otherwise


def _matches(lora: LoraConfig, name: str, targets: str | list[str], excluded: str | list[str] | None) -> bool:
    """Whether PEFT would adapt ``name`` under ``lora`` with other ``targets`` and ``excluded``."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    probe = LoraConfig(
        target_modules=targets,
        exclude_modules=excluded,
        modules_to_save=lora.modules_to_save,
        layers_to_transform=lora.layers_to_transform,
        layers_pattern=lora.layers_pattern,
    )
    return bool(check_target_module_exists(probe, name))


def _other_kinds(modules: Mapping[str, nn.Module], lora: LoraConfig) -> dict[str, str]:
    """The modules that ``target_modules`` names and that are no linear layers, with the reason to skip them."""
    others = {name: module for name, module in modules.items() if name and not is_linear(module)}
    return {n: f"{type(m).__name__} is no linear layer" for n, m in others.items() if _is_named(n, lora)}


def _is_named(name: str, lora: LoraConfig) -> bool:
    """Whether PEFT would adapt ``name`` because ``target_modules`` lists or describes it."""
    if lora.target_modules is None or _is_all_linear(lora):
        return False
    return _matches(lora, name, lora.target_modules, lora.exclude_modules)


def _nothing_matched(
    lora: LoraConfig, skipped: Mapping[str, str], others: Mapping[str, str], parameters: Collection[str]
) -> str:
    """The error's text: the wanted names and the closest layers."""
    if parameters:
        return (
            f"fused experts alone ({min(parameters)} and {len(parameters) - 1} more) leave nothing to choose from; "
            "name linear layers in target_modules as well, or attach these adapters with PEFT's get_peft_model"
        )
    if lora.target_modules is None or _is_all_linear(lora):
        return "no site is left: " + "; ".join(f"{name}: {reason}" for name, reason in sorted(skipped.items())[:5])
    wanted = [lora.target_modules] if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    known = sorted({name.rsplit(".", 1)[-1] for name in skipped} | set(skipped))
    close = [match for want in wanted for match in similar(want, known, count=2, cutoff=0.4)]
    # Name first a wanted layer that was skipped for another reason.
    left_out = [f"{n} ({why})" for n, why in others.items()]
    left_out += [
        f"{name} ({reason})"
        for name, reason in sorted(skipped.items())
        if reason != "not in target_modules" and name.endswith(tuple(wanted))
    ]
    close = left_out[:2] or close
    hint = f"the closest: {', '.join(dict.fromkeys(close))}" if close else f"there are: {', '.join(known[:8])}"
    return f"target_modules={wanted} match none of the {len(skipped)} linear layers; {hint}"


def _is_all_linear(lora: LoraConfig) -> bool:
    """Whether the target is PEFT's ``"all-linear"``, in upper or lower case."""
    return isinstance(lora.target_modules, str) and lora.target_modules.lower() == "all-linear"
