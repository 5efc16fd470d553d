"""Rules of thumb, which read neither batches nor weights: blocks by their place, projections by their name."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from weightlora.errors import SelectionError
from weightlora.model.sites import Site
from weightlora.plan.heatmap import ordered_projections, projection_role
from weightlora.selection.rules.base import OnePass, Scores, require

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage

Kind = Literal["last_layers", "first_layers", "strided", "mlp", "attention", "v_o_down", "stratified"]
KINDS: tuple[str, ...] = get_args(Kind)
#: Larger than any seed that users give, so that no draw of one seed is a draw of the next.
_FAR = 1_000_003


@dataclass(frozen=True)
class Heuristic(OnePass):
    """Score sites by a rule of thumb: the baselines that a measured score has to beat.

    No batch is read and nothing is trained. Each kind is a rule of its own name, such as ``rule="strided"``:

    - ``last_layers`` and ``first_layers``: the sites nearest to the model's output or input first, block after block.
    - ``strided``: whole blocks, spread over the depth. The first K blocks are spread about evenly for every K.
    - ``mlp`` and ``attention``: the projections of that part, in random order. No other site is kept.
    - ``v_o_down``: value, attention's output and the MLP's down projection, in random order. No other site is kept. A
      projection that computes query, key and value together, as GPT-2's ``c_attn``, counts as value.
    - ``stratified``: random, and about the same share of every projection at every budget.

    The place of a site is that of its layer in ``model.modules()``. A random order depends on ``select``'s seed and the
    sites alone, not on rank, batches or model weights.

    Args:
        kind: One of the above.
        draw: Another number is another random order for the same seed.

    Raises:
        OptionError: There is no such kind.

    Example:
        >>> Heuristic("strided")
        Heuristic(kind='strided', draw=0)
    """

    kind: Kind = "stratified"
    draw: int = 0
    name: ClassVar[str] = "heuristic"
    knobs: ClassVar[tuple[str, ...]] = ()
    trains_adapters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"kind={self.kind!r}", f"one of {', '.join(KINDS)}")
        require(self.draw >= 0, f"draw={self.draw!r}", "0 or a larger whole number")

    @property
    def head_steps(self) -> int:
        """0: no batch is read."""
        return 0

    def batches(self, steps: Sequence[int]) -> int:  # noqa: ARG002
        """None."""
        return 0

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - reads no batch
        """Yield the scores, in one row; 0 for sites that the kind leaves out.

        Raises:
            SelectionError: The kind leaves out every site.
        """
        modules = {id(module): place for place, module in enumerate(stage.model.modules())}
        in_model = sorted(stage.layers, key=lambda name: modules[id(stage.layers[name])])
        # The seed of the warm-up, and not the generator's state, which depends on the rank.
        generator = torch.Generator().manual_seed(torch.initial_seed() + _FAR * self.draw)
        found = _SCORED[self.kind]([Site(name, 0, 0) for name in in_model], generator)
        if not found:
            projections = ", ".join(ordered_projections(Site(name, 0, 0).projection for name in in_model))
            raise SelectionError(
                f"kind={self.kind!r} fits no site: the projections are {projections}; widen target_modules"
            )
        scores = tuple(found.get(name, 0.0) for name in stage.layers)
        yield steps[-1], Scores((scores,), (True,) * len(scores), scores)


def spread_order(count: int) -> list[int]:
    """Return 0 … count−1 so that the first K are spread about evenly, for every K: van der Corput's order.

    The numbers are sorted by their binary digits read backwards.

    Example:
        >>> spread_order(8), spread_order(6)
        ([0, 4, 2, 6, 1, 5, 3, 7], [0, 4, 2, 1, 5, 3])
    """
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{digits}b}"[::-1], 2))


def _by_place(names: Sequence[str]) -> dict[str, float]:
    """Scores from 1 downwards in the order of ``names``, all positive."""
    return {name: 1 - k / len(names) for k, name in enumerate(names)}


def _first_layers(sites: Sequence[Site], _: torch.Generator) -> dict[str, float]:
    return _by_place([site.name for site in sites])


def _last_layers(sites: Sequence[Site], _: torch.Generator) -> dict[str, float]:
    return _by_place([site.name for site in reversed(sites)])


def _strided(sites: Sequence[Site], _: torch.Generator) -> dict[str, float]:
    # A site outside all blocks is a block of its own.
    blocks = [*_grouped(sites, lambda site: site.block or site.name).values()]
    return _by_place([name for place in spread_order(len(blocks)) for name in blocks[place]])


def _mlp(sites: Sequence[Site], generator: torch.Generator) -> dict[str, float]:
    return _random([s.name for s in sites if projection_role(s.projection)[0] == "mlp"], generator)


def _attention(sites: Sequence[Site], generator: torch.Generator) -> dict[str, float]:
    parts = ("attention", "cross-attention")
    return _random([s.name for s in sites if projection_role(s.projection)[0] in parts], generator)


def _v_o_down(sites: Sequence[Site], generator: torch.Generator) -> dict[str, float]:
    roles = ("qkv", "value", "output", "down")
    return _random([s.name for s in sites if projection_role(s.projection)[1] in roles], generator)


def _stratified(sites: Sequence[Site], generator: torch.Generator) -> dict[str, float]:
    """Score 1 − (k + u)/n for the k-th of the n sites of a projection in random order, with one u in [0, 1) for all."""
    scores: dict[str, float] = {}
    for names in _grouped(sites, lambda site: site.projection).values():
        shift = float(torch.rand((), generator=generator, dtype=torch.float64))
        for k, place in enumerate(torch.randperm(len(names), generator=generator).tolist()):
            scores[names[place]] = 1 - (k + shift) / len(names)
    return scores


def _random(names: Sequence[str], generator: torch.Generator) -> dict[str, float]:
    order: list[int] = torch.randperm(len(names), generator=generator).tolist()
    return _by_place([names[place] for place in order])


def _grouped(sites: Sequence[Site], key: Callable[[Site], str]) -> dict[str, list[str]]:
    """Names by ``key``, in the order of the sites."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site.name)
    return groups


_SCORED: Mapping[str, Callable[[Sequence[Site], torch.Generator], dict[str, float]]] = {
    "last_layers": _last_layers,
    "first_layers": _first_layers,
    "strided": _strided,
    "mlp": _mlp,
    "attention": _attention,
    "v_o_down": _v_o_down,
    "stratified": _stratified,
}
