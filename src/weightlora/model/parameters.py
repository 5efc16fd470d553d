"""Parameters that PEFT adapts without a layer around them (``target_parameters``), such as fused experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightlora.errors import SiteError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, order=True)
class TargetParameter:
    """A parameter with an adapter of its own. It is no site: no method changes its rank.

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
