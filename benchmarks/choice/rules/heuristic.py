"""Rules of thumb, which read neither batches nor weights: blocks by their place, projections by their name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from weightlora.errors import SelectionError
from weightlora.model.sites import Site
from weightlora.plan.heatmap import ordered_projections, projection_role
from weightlora.selection.rules.base import BlindRule, Scores
from weightlora.selection.rules.stratified import drawing

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Heuristic(BlindRule):
    """Score sites by a rule of thumb: a baseline that a measured score has to beat. No batch is read."""

    @abstractmethod
    def order(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that may be kept, the best first; ``sites`` are in the order of the model's modules."""

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - reads no batch
        """Yield the scores in one row: from 1 downwards, and 0 for sites that are left out.

        Raises:
            SelectionError: Every site is left out.
        """
        best = self.order(stage.sites_in_model())
        if not best:
            projections = ", ".join(ordered_projections(site.projection for site in stage.sites))
            raise SelectionError(
                f"{type(self).__name__} fits no site: the projections are {projections}; widen target_modules"
            )
        found = {site.name: 1 - k / len(best) for k, site in enumerate(best)}
        scores = tuple(found.get(name, 0.0) for name in stage.layers)
        yield steps[-1], Scores((scores,), (True,) * len(scores), scores)


class FirstLayers(Heuristic):
    """The sites nearest to the model's input first, block after block."""

    def order(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites as they are."""
        return [*sites]


class LastLayers(Heuristic):
    """The sites nearest to the model's output first, block after block."""

    def order(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites from the last one."""
        return [*reversed(sites)]


class Strided(Heuristic):
    """Whole blocks, spread over the depth: the first K are spread about evenly for every K."""

    def order(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites block by block; a site outside all blocks is a block of its own."""
        blocks: dict[str, list[Site]] = {}
        for site in sites:
            blocks.setdefault(site.block or site.name, []).append(site)
        parts = [*blocks.values()]
        return [site for place in spread_order(len(parts)) for site in parts[place]]


@dataclass(frozen=True)
class Drawn(Heuristic):
    """The projections of a part of the block, in random order.

    Args:
        draw: Another number is another random order for the same seed.
    """

    draw: int = 0
    roles: ClassVar[frozenset[str]]
    """Parts of the block, or roles in it, as ``projection_role`` names them."""

    def order(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites of the part."""
        own = [site for site in sites if self.roles & {*projection_role(site.projection)}]
        order: list[int] = torch.randperm(len(own), generator=drawing(self.draw)).tolist()
        return [own[place] for place in order]


class Mlp(Drawn):
    """Projections of the MLP."""

    roles = frozenset({"mlp"})


class Attention(Drawn):
    """Projections of attention."""

    roles = frozenset({"attention", "cross-attention"})


class VOutDown(Drawn):
    """Value, attention's output and the MLP's down projection.

    A projection that computes query, key and value together, as GPT-2's ``c_attn``, counts as value.
    """

    roles = frozenset({"qkv", "value", "output", "down"})


def spread_order(count: int) -> list[int]:
    """Return 0 … count−1 so that the first K are spread about evenly, for every K: van der Corput's order.

    The numbers are sorted by their binary digits read backwards.

    Example:
        >>> spread_order(8), spread_order(6)
        ([0, 4, 2, 6, 1, 5, 3, 7], [0, 4, 2, 1, 5, 3])
    """
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{digits}b}"[::-1], 2))
