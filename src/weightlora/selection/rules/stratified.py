"""The rule ``stratified``: random sites, of every projection alike. The control that a measured score has to beat."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightlora.selection.rules.base import BlindRule, Scores, require

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage

#: Larger than any seed that users give, so that no draw of one seed is a draw of the next.
_FAR = 1_000_003


@dataclass(frozen=True)
class Stratified(BlindRule):
    """Score sites at random, so that about the same share of every projection is kept at every budget.

    No batch is read and nothing is trained. The order depends on ``select``'s seed and the sites alone, not on rank,
    batches or model weights. The place of a site is that of its layer in ``model.modules()``.

    Args:
        draw: Another number is another random order for the same seed.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Stratified(draw=1)
        Stratified(draw=1)
    """

    draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.draw >= 0, f"draw={self.draw!r}", "0 or a larger whole number")

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - reads no batch
        """Yield the scores in one row: 1 − (k + u)/n for the k-th of a projection's n sites, with one u in [0, 1)."""
        generator = drawing(self.draw)
        by_projection: dict[str, list[str]] = {}
        for site in stage.sites_in_model():
            by_projection.setdefault(site.projection, []).append(site.name)
        found: dict[str, float] = {}
        for names in by_projection.values():
            shift = float(torch.rand((), generator=generator, dtype=torch.float64))
            for k, place in enumerate(torch.randperm(len(names), generator=generator).tolist()):
                found[names[place]] = 1 - (k + shift) / len(names)
        scores = tuple(found[name] for name in stage.layers)
        yield steps[-1], Scores((scores,), (True,) * len(scores), scores)


def drawing(draw: int) -> torch.Generator:
    """Return the random numbers of a draw: of the scoring's seed, and not of the generator's state."""
    return torch.Generator().manual_seed(torch.initial_seed() + _FAR * draw)  # the state depends on the rank
