"""What the files of a PEFT LoRA adapter hold: the sites with their ranks and scales, and whatever else was saved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightlora.errors import PlanError
from weightlora.model.sites import Site
from weightlora.plan.from_adapter import adapter_config, require_lora, tensor_headers

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
