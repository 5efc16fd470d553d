"""What the files of a PEFT LoRA adapter hold: the sites with their ranks and scales, and whatever else was saved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from weightlora.errors import PlanError
from weightlora.model.sites import Site
from weightlora.plan.from_adapter import adapter_config, tensor_shapes

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
    others: tuple[str, ...]
    """Names of all tensors that are neither A nor B of a linear layer or an embedding."""

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(own.r for own in self.sites)

    @property
    def asked_rank(self) -> int:
        """The largest rank in the configuration, whether or not a site has it."""
        return max(self.config["r"], *(self.config.get("rank_pattern") or {}).values(), self.rank)


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
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not (_is_positive(r) and isinstance(r, int) and _is_positive(alpha)):
        raise PlanError(
            f"{folder} has r={r!r:.40} and lora_alpha={alpha!r:.40}; give a whole number and a positive one"
        )
    if config.get("peft_type") not in (None, "LORA"):
        raise PlanError(f"{folder} holds an adapter of peft_type={config['peft_type']!r:.40}; only LORA can be read")
    shapes = tensor_shapes(folder)
    matrices: dict[str, dict[str, tuple[int, ...]]] = {}
    others: list[str] = []
    embeddings: set[str] = set()
    for key, shape in shapes.items():
        match = _MATRIX.fullmatch(key)
        if match is None or len(shape) != 2:
            others.append(key)
        else:
            matrices.setdefault(match[1], {})[match[3]] = shape
            embeddings |= {match[1]} if match[2] else set()
    if not matrices:
        raise PlanError(f"{folder} holds no LoRA matrices; its tensors are named {', '.join(list(shapes)[:3])}")
    sites = tuple(
        replace(_adapted(folder, config, name, matrices[name]), embedding=name in embeddings)
        for name in sorted(matrices)
    )
    return Adapter(folder, config, sites, tuple(others))


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
        value = patterns.get(get_pattern_key(list(patterns), name), config.get(default))
    except (AttributeError, TypeError, re.error) as error:
        raise PlanError(f"{folder} has {pattern}={patterns!r:.60}; give a mapping of layer names to numbers") from error
    if not _is_positive(value):
        raise PlanError(f"{folder} has {default}={value!r:.40} for {name}; give a positive number")
    return value


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
