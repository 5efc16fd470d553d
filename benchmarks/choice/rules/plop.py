"""The rule ``plop``: layers whose inputs are not aligned with their weights first."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from weightlora.model.distributed import add_up
from weightlora.model.gathering import loaded
from weightlora.selection.rules.base import Rule, Scores, jackknife_of_rows, require

from .layer_inputs import layer_inputs

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage

By = Literal["type", "site"]
BY: tuple[str, ...] = get_args(By)
#: Share of a site's own NFN in that of its type. It decides the order within a type, and hardly ever between types.
_OWN_SHARE = 1e-6


@dataclass(frozen=True)
class PLoP(Rule):
    """Score a site by 1 ÷ NFN, the normalised feature norm of its frozen layer (PLoP, arXiv:2506.20629).

    NFN = E‖W·z‖ ÷ E‖W·z̃‖. The means are over the tokens of all batches: z is a token's input, and z̃ is a Gaussian
    vector with the norm of z. The paper adapts the types of projections with the lowest mean NFN. No gradient is
    computed; each token passes each layer three times instead of once.

    The Gaussian vectors come from torch's global generator, which ``select`` seeds.

    Args:
        by: ``"type"`` (the paper) scores a site by the mean NFN of all sites with its name inside the block, such as
            ``mlp.down_proj``; sites of one type follow each other by their own NFN. ``"site"`` uses each site's own.
        head_steps: Steps in which a new head is trained alone first. 0, because no site's input depends on the head.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> PLoP(by="site")
        PLoP(head_steps=0, by='site')
    """

    by: By = "type"
    head_steps: int | None = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.by in BY, f"by={self.by!r}", f"one of {', '.join(BY)}")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the last scores; nothing is trained."""
        count = steps[-1]
        norms = _norms(stage, count)
        types = [site.projection for site in stage.sites] if self.by == "type" else list(stage.layers)
        history = [_scores(sums, types) for sums in norms.cumsum(0)]
        known = jackknife_of_rows(norms, lambda some: _scores(some.sum(0), types))
        final = tuple(history[-1].tolist())
        rows, moved = tuple(tuple(row.tolist()) for row in history), tuple(value > 0 for value in final)
        yield count, Scores(rows, moved, final, errors=known.errors, halves=known.halves)


def _norms(stage: Stage, steps: int) -> Tensor:
    """Σ‖W·z‖ and Σ‖W·z̃‖ over the tokens of each step's batch, (T, 2, sites), summed over the processes."""
    places = {name: i for i, name in enumerate(stage.layers)}
    bases = {name: layer.get_base_layer() for name, layer in stage.layers.items()}
    norms = torch.zeros(steps, 2, len(places), dtype=torch.float64)
    step = 0

    def measure(site: str, z: Tensor) -> None:
        noise = torch.randn_like(z)
        noise *= _lengths(z)[:, None] / _lengths(noise)[:, None]
        for row, inputs in enumerate((z, noise)):
            norms[step, row, places[site]] += _lengths(_without_bias(bases[site], inputs)).sum().double().cpu()

    with layer_inputs(stage, measure):
        for step in range(steps):
            stage.forward("scoring", step + 1)
    return add_up(norms)


def _without_bias(base: Any, inputs: Tensor) -> Tensor:
    """W·x by the layer's own forward pass, which knows quantised and transposed weights; its hooks do not run."""
    output: Tensor = base.forward(inputs)
    if base.bias is None:
        return output
    with loaded(base):
        return output - base.bias


def _lengths(rows: Tensor) -> Tensor:
    """The norm of each row, at least in fp32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).norm(dim=-1)


def _scores(sums: Tensor, types: Sequence[str]) -> Tensor:
    """1 ÷ NFN of each site or, nearly, of its type, by the sums (2, sites); 0 where no token was measured."""
    measured = (sums > 0).all(0)
    own = torch.where(measured, sums[0] / sums[1], 0.0)
    means = _means(own[measured].tolist(), [kind for kind, known in zip(types, measured, strict=True) if known])
    mean = torch.tensor([means.get(kind, 0.0) for kind in types], dtype=sums.dtype)
    return torch.where(measured, 1 / (mean + _OWN_SHARE * (own - mean)), 0.0)


def _means(values: Sequence[float], types: Sequence[str]) -> Mapping[str, float]:
    """The mean of the values of each type."""
    of: dict[str, list[float]] = {}
    for value, kind in zip(values, types, strict=True):
        of.setdefault(kind, []).append(value)
    return {kind: sum(found) / len(found) for kind, found in of.items()}
