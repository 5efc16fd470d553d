"""What the files of a PEFT LoRA adapter hold, and the layers of its base model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, PlanError, WeightLoraWarning
from weightlora.model.sites import LOADERS, Site, block_of, find_sites
from weightlora.plan.plan import adapter_config, require_lora, tensor_headers
from weightlora.tasks.embedded import base_files

if TYPE_CHECKING:
    from weightlora.serving import Group

_FLOATS = ("F64", "F32", "F16", "BF16")
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")


@dataclass(frozen=True)
class Adapted:
    """A site of an adapter."""

    site: Site
    r: int
    scale: float
    """What PEFT multiplies B·A by."""
    embedding: bool = False
    """Whether it is an embedding; A then has a column for each word."""


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter; no tensor is loaded."""

    folder: Path
    config: Mapping[str, Any]
    sites: tuple[Adapted, ...]
    """Sorted by name."""
    others: Mapping[str, tuple[int, ...]]
    """Shapes of all tensors that are neither A nor B of a linear layer or an embedding."""

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(own.r for own in self.sites)

    @property
    def asked_rank(self) -> int:
        """The largest rank in the configuration, whether or not a site has it."""
        return max(self.config["r"], *(self.config.get("rank_pattern") or {}).values(), self.rank)

    def embeds(self, name: str) -> bool:
        """Whether the site of that name is an embedding."""
        return any(own.embedding for own in self.sites if own.site.name == name)


def base_name(adapter: Adapter) -> str:
    """Return the base model that an adapter names; empty where it names none."""
    return adapter.config.get("base_model_name_or_path") or ""


def matrix_name(site: str, matrix: str, *, embedding: bool = False) -> str:
    """Return PEFT's name of A or B in an adapter's file.

    Example:
        >>> matrix_name("model.layers.0.mlp.up_proj", "A")
        'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
        >>> matrix_name("model.embed_tokens", "A", embedding=True)
        'base_model.model.model.embed_tokens.lora_embedding_A'
    """
    return f"base_model.model.{site}.lora_" + (f"embedding_{matrix}" if embedding else f"{matrix}.weight")


def read_files(folder: str | Path) -> Adapter:
    """Return what an adapter directory holds; configuration and headers are read, and no weights.

    Args:
        folder: Where PEFT saved a LoRA adapter, made by whatever tool.

    Raises:
        PlanError: The directory holds no LoRA adapter, or PEFT could not load it.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    require_lora(folder, config)
    matrices: dict[str, dict[str, tuple[int, ...]]] = {}
    others: dict[str, tuple[int, ...]] = {}
    embeddings: dict[str, bool] = {}
    headers = tensor_headers(folder)
    for key, (dtype, shape) in headers.items():
        if not key.isprintable():
            raise PlanError(f"{folder} is damaged: a tensor is named {key!r:.80}")
        match = _MATRIX.fullmatch(key)
        if match is None or len(shape) != 2:
            others[key] = shape
            continue
        if dtype not in _FLOATS:
            raise PlanError(f"{folder} has {key} of type {dtype}; give floating-point numbers of 16 bits or more")
        matrices.setdefault(match[1], {})[match[3]] = shape
        if embeddings.setdefault(match[1], bool(match[2])) != bool(match[2]):
            raise PlanError(f"{folder} is damaged: {match[1]} has matrices of a linear layer and of an embedding")
    if not matrices:
        raise PlanError(f"{folder} holds no LoRA matrices; its tensors are named {', '.join(list(headers)[:3])}")
    sites = tuple(
        replace(_adapted(folder, config, name, matrices[name]), embedding=embeddings[name]) for name in sorted(matrices)
    )
    return Adapter(folder, config, sites, others)


def _adapted(folder: Path, config: Mapping[str, Any], name: str, own: Mapping[str, tuple[int, ...]]) -> Adapted:
    (r, in_features), (out_features, columns) = own.get("A", (0, 0)), own.get("B", (0, 0))
    wanted = _setting(folder, config, "rank_pattern", "r", name)
    if not r == columns == wanted:
        raise PlanError(
            f"{folder} is damaged: {name} has A of rank {r} and B of rank {columns}, its configuration says {wanted:g}"
        )
    alpha = _setting(folder, config, "alpha_pattern", "lora_alpha", name)
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return Adapted(Site(name, in_features, out_features), r, scale)


def _setting(folder: Path, config: Mapping[str, Any], pattern: str, default: str, name: str) -> float:
    """``r`` or ``lora_alpha`` of a site, by PEFT's rule for patterns."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(pattern) or {}
    try:
        return patterns.get(get_pattern_key(list(patterns), name), config[default])
    except (re.error, RecursionError, OverflowError) as error:
        raise PlanError(f"{folder} has {pattern}={patterns!r:.60}; {error} in a layer's name") from error


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base model without its weights; nothing, where it is not at hand."""

    layers: Mapping[str, Site] = field(default_factory=dict[str, Site])
    """Linear layers, output head and embeddings by name."""
    tied: frozenset[str] = frozenset()
    """Output head and embeddings, where they share their weights."""
    model_type: str = ""
    """As in its configuration; empty where this is not known."""
    architecture: str = ""
    """The class that transformers makes of it for the adapter's task."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Of its parameters."""


def is_here(name: str) -> bool:
    """Whether a base model can be read without asking a hub: a folder with a configuration, or an embedded model.

    Example:
        >>> is_here("meta-llama/Llama-3.1-8B"), is_here("")
        (False, False)
    """
    return base_files(name) is not None or (Path(name) / "config.json").is_file()


def read_base(name: str, task_type: str | None) -> BaseModel:
    """Return the layers of a base model; its weights are neither read nor made.

    Args:
        name: A folder with ``config.json``, a hub name, or ``embedded/smollm2``.
        task_type: PEFT's, which decides the class of the model; None stands for a causal language model.

    Raises:
        DataError: There is no such configuration, or no such model can be made of it.
    """
    import torch
    from peft import LoraConfig

    model = _empty_model(name, task_type)
    with warnings.catch_warnings():  # of layers that PEFT refuses, which nobody asked for
        warnings.simplefilter("ignore", WeightLoraWarning)
        layers = {site.name: site for site in find_sites(model, LoraConfig(target_modules="all-linear")).sites}
    ends: set[str] = set()
    for part, module in model.named_modules():
        if module is model.get_input_embeddings() and isinstance(module, torch.nn.Embedding):
            layers[part] = Site(part, module.num_embeddings, module.embedding_dim)
            ends |= {part}
        elif module is model.get_output_embeddings() and isinstance(module, torch.nn.Linear):
            layers[part] = Site(part, module.in_features, module.out_features)
            ends |= {part}
    tied = frozenset(ends if model.config.tie_word_embeddings else ())
    shapes = {part: tuple(value.shape) for part, value in model.named_parameters(remove_duplicate=False)}
    return BaseModel(layers, tied, model.config.model_type, type(model).__name__, shapes)


def write_config(name: str, task_type: str | None, folder: str | Path) -> Path:
    """Write ``config.json`` of a base model, with the class of the model, and return ``folder``.

    Raises:
        DataError: There is no such base model.
    """
    model = _empty_model(name, task_type)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return Path(folder)


def _empty_model(name: str, task_type: str | None) -> Any:
    """A base model without numbers."""
    import torch
    import transformers

    folder, gguf = base_files(name) or (name, None)
    loader: Any = getattr(transformers, LOADERS.get(str(task_type), "AutoModelForCausalLM"))
    extra: Mapping[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **extra)
        with torch.device("meta"):
            return loader.from_config(config)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the base model {name}: {str(error).splitlines()[0]}; give --base") from error


def last_name(site: str) -> str:
    """Return the last part of a site's name.

    Example:
        >>> last_name("model.layers.0.mlp.up_proj")
        'up_proj'
    """
    return site.rpartition(".")[2]


def layer_number(site: str) -> str:
    """Return the number of the layer that a site is in; empty outside of layers.

    Example:
        >>> layer_number("model.layers.12.mlp.up_proj"), layer_number("lm_head")
        ('12', '')
    """
    return last_name(block_of(site))


def missing_layers(sites: Iterable[Site], base: Mapping[str, Site]) -> dict[str, list[str]]:
    """Return the projections that some layers lack, each with the names of the sites that are not there.

    Args:
        sites: Those of the adapter; sites outside of layers, such as an output head, are left out.
        base: The base model's linear layers; empty takes the layers from 0 to the last that the adapter has.

    Example:
        >>> missing_layers([Site("h.0.q", 1, 1), Site("h.2.q", 1, 1), Site("h.0.v", 1, 1)], {})
        {'q': ['h.1.q'], 'v': ['h.1.v', 'h.2.v']}
    """
    present = [site for site in sites if site.block]
    names = {site.name for site in present}
    found: dict[str, list[str]] = {}
    for stack, projection in sorted({(_stack(site), site.projection) for site in present}):
        if base:
            wanted = [own.name for own in base.values() if (_stack(own), own.projection) == (stack, projection)]
        else:
            last = max(int(layer_number(site.name)) for site in present if _stack(site) == stack)
            wanted = [f"{stack}{number}.{projection}" for number in range(last + 1)]
        holes = [name for name in wanted if name not in names]
        if holes:
            found[projection] = holes
    return found


def split_groups(sites: Iterable[str], group: Group, base: Mapping[str, Site]) -> Iterator[tuple[str, list[str]]]:
    """Yield a part of ``group`` that the adapter has in a block, and the names in this block that it needs in addition.

    Args:
        sites: Names of the adapter's sites.
        group: Projections that are one matrix in the runtime.
        base: The base model's linear layers; what it does not have is not needed.
    """
    names = set(sites)
    for name in sorted(names):
        stem = name.removesuffix(last_name(name))
        lacking = [
            stem + other for other in group.needed if stem + other not in names and (not base or stem + other in base)
        ]
        if last_name(name) in group.names and lacking:
            yield name, lacking


def _stack(site: Site) -> str:
    """The name up to the layer's number."""
    return site.block.removesuffix(layer_number(site.name))
