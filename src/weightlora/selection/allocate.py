"""The one solver: scores, costs and limits become the rank of each site. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from weightlora.cost.knapsack import Cost, CostBudget, additive_cost
from weightlora.cost.stored_run import RunBudget, StoredRun
from weightlora.errors import OptionError
from weightlora.model.sites import Site, output_vectors, rank_and_alpha
from weightlora.plan.budget import Budget, Chooser, Ranking, chosen_ranks, ranked
from weightlora.plan.limits import Limits
from weightlora.text import natural

if TYPE_CHECKING:
    from peft import LoraConfig
    from typing_extensions import TypeIs

    from weightlora.cost.peak import MicroBatch

SiteScores = Sequence[float]
RankScores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Costs:
    """What adapters cost in one model, in the order of its candidates.

    Example:
        >>> Costs(ranks=(8, 8), of_rank=(10, 20)).parameters([1, 2])
        50
    """

    ranks: tuple[int, ...]
    """The user's rank of each site: plain LoRA."""
    of_rank: tuple[int, ...]
    """Parameters of one rank."""
    fixed: tuple[int, ...] = ()
    """Parameters of an adapter that its rank does not change (DoRA's magnitude, B's bias); empty where it is 0."""
    time: Cost | None = None
    """Nanoseconds of a step for each set of sites at the user's ranks, where time is limited."""
    memory: Cost | None = None
    """Bytes at the peak for each set of sites at the user's ranks, where memory is limited."""
    micro_batch: MicroBatch | None = None
    """The largest with which all sites fit into memory; None where they fit without, or do not with a single row."""
    run: StoredRun | None = None
    """The same as ``time`` in a run with a store, whose limit is a share of LoRA's run."""
    frees_steps: bool = False
    """Whether this run may also take fewer steps; then floors compete with them."""
    besides: int = 0
    """Parameters of adapters that are not chosen, such as those of ``target_parameters``."""

    @classmethod
    def of(cls, sites: Sequence[Site], lora: LoraConfig, *, besides: int = 0) -> Costs:
        """Return the costs in parameters of a user's LoRA."""
        ranks = tuple(rank_and_alpha(lora, site.name)[0] for site in sites)
        vectors = output_vectors(lora)
        fixed = tuple(vectors * site.out_features for site in sites) if vectors else ()
        return cls(ranks, tuple(site.parameters(1) for site in sites), fixed, besides=besides)

    @cached_property
    def adapters(self) -> tuple[int, ...]:
        """Parameters of plain LoRA's adapter at each site."""
        return tuple(self.adapter(i, r) for i, r in enumerate(self.ranks))

    def parameters(self, ranks: Sequence[int]) -> int:
        """Parameters of adapters of these ranks; 0 is no adapter."""
        return sum(self.adapter(i, r) for i, r in enumerate(ranks))

    def adapter(self, i: int, r: int) -> int:
        """Parameters of an adapter of rank ``r`` at a site."""
        return r * self.of_rank[i] + (self.fixed[i] if r and self.fixed else 0)

    def growth(self, cost: Cost, ranks: Sequence[int]) -> int:
        """The most that ranks above the user's add to a measured cost, of which none is measured.

        What an adapter itself takes is counted as if all of it grew with its rank.

        Example:
            >>> Costs(ranks=(8, 8), of_rank=(10, 20)).growth(additive_cost([4, 6]), [16, 0])
            4
        """
        kept = [i for i, r in enumerate(ranks) if r]
        more = max((Fraction(ranks[i], self.ranks[i]) for i in kept), default=Fraction(1))
        return math.ceil((more - 1) * cost.in_adapters(kept)) if more > 1 else 0


def allocate(
    sites: Sequence[Site],
    scores: SiteScores | RankScores | None,
    costs: Costs,
    limits: Limits,
    *,
    ranking: Ranking = "score",
) -> list[int]:
    """Return the rank of each site within all limits; 0 = no adapter.

    1. ``adapters``, ``time`` and ``memory`` give the sites: those of the largest total score that fit, at the user's
       rank. A site without a positive score is not kept. Without any of these limits all sites are open.
    2. ``parameters`` gives the ranks on them: the same share of the user's rank on each, at least 1, as large as fits.
       Where that is rank 1, what is left raises single sites to 2, the best score first; where nothing is scored, in an
       order that is spread over depth and projections. Higher up it is not spent, since rank 3 on half of the sites
       did no better than rank 2 on all. Where rank 1 on all does not fit, as many sites as fit have rank 1.
    3. Without ``parameters`` each of these sites has the user's rank.
    4. Where ranks are scored one by one, ``parameters`` go to the ranks of the best score for their parameters instead.
    5. Scores of sites with ``parameters`` alone keep whole adapters: who names such a rule asks for this. The best
       score comes first, and an adapter that no longer fits is passed over.
    6. Where ``time`` is that of a run that may take fewer steps, the sites are all those above a floor: see
       :class:`weightlora.cost.stored_run.RunBudget`. No rank is then above the user's.

    With ``parameters`` alone no rank is above the user's. A rank above it, which 2 may give next to another limit,
    never breaks a limit on time or memory: what an adapter itself takes is counted as if all of it grew with its rank.

    Args:
        sites: All candidates.
        scores: Of each site, or of each rank of each site; None where nothing was scored.
        costs: What they cost.
        limits: What is allowed.
        ranking: How sites compete for a number of adapters or parameters.

    Raises:
        OptionError: Nothing fits.

    Example:
        >>> sites = [Site(f"layer.{i}.q", 5, 5) for i in range(4)]
        >>> costs = Costs(ranks=(8,) * 4, of_rank=(10,) * 4)
        >>> allocate(sites, [1.0, 4.0, 3.0, 2.0], costs, Limits(adapters=2))
        [0, 8, 8, 0]
        >>> allocate(sites, None, costs, Limits(parameters=0.25)), allocate(sites, None, costs, Limits(parameters=30))
        ([2, 2, 2, 2], [1, 1, 1, 0])
        >>> allocate(sites, [1.0, 4.0, 3.0, 2.0], costs, Limits(adapters=2, parameters=1.0))
        [0, 16, 16, 0]
    """
    limits = limits.limits
    if scores is not None and _of_ranks(scores):
        return chosen_ranks(rank_budget(costs, limits), scores)
    spread = spread_order(sites)
    if scores is None:
        sizes, order = [1 + 1 / (2 + place) for _, place in sorted(zip(spread, range(len(sites)), strict=True))], spread
    else:
        sizes = list(scores)
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    is_uniform = scores is None and limits.frees_ranks
    chosen = range(len(sites)) if is_uniform else chooser_of(sites, costs, limits, ranking).choose(sizes)
    kept = {i for i in chosen if sizes[i] > 0}
    if limits.parameters is None or (limits.frees_ranks and not is_uniform):
        return [r if i in kept else 0 for i, r in enumerate(costs.ranks)]
    return _filled([i for i in order if i in kept], costs, limits)


def chooser_of(sites: Sequence[Site], costs: Costs, limits: Limits, ranking: Ranking) -> Chooser:
    """Return what chooses whole sites at the user's rank within the limits; rules use it, too.

    Raises:
        OptionError: No site fits, or the ranking does not go with these limits.
    """
    limits, n = limits.limits, len(sites)
    k = limits.k_of(n)
    if costs.frees_steps:
        return run_budget(costs, limits)
    if limits.are_measured:
        bounds = [*_measured(costs, limits), *([(additive_cost((1,) * n), k)] if k is not None else [])]
        budget = CostBudget(tuple(cost for cost, _ in bounds), tuple(limit for _, limit in bounds))
        if not any(budget.holds([i]) for i in range(n)):
            raise OptionError(f"no site fits {limits.text}{_what_is_missing(sites, costs, limits, bounds)}")
    elif k is None:
        budget = Budget(costs.adapters, _most(costs, limits), costs.fixed)
        smallest = min(range(n), key=lambda i: costs.adapters[i])
        if budget.limit < costs.adapters[smallest]:
            raise OptionError(
                f"no site fits {limits.text} ({budget.limit:,} of plain LoRA's {sum(costs.adapters):,} parameters): "
                f"the smallest adapter, at {sites[smallest].name}, has {costs.adapters[smallest]:,}; raise parameters, "
                "lower r, or leave rule out, so that ranks are free"
            )
    else:
        budget = Budget.of_count(k, n=n)
    return ranked(budget, ranking, sites)


def run_budget(costs: Costs, limits: Limits) -> RunBudget:
    """Return the budget of a run with a store that may take fewer steps.

    Raises:
        OptionError: The selection alone takes the whole time.
    """
    limit = None if costs.time is None else limits.time_of(costs.time.of_all)
    assert costs.run is not None, "a run is measured"
    assert limit is not None, "its time is limited"
    if limit <= costs.run.selecting:
        raise OptionError(f"{limits.text}: the selection alone takes as long; lower steps, raise time, or train longer")
    return RunBudget(costs.run, limit)


def site_budget(sites: Sequence[Site], lora: LoraConfig, limits: Limits) -> Budget:
    """Return the budget of a method that keeps whole adapters, within a number of them or of parameters.

    Raises:
        OptionError: Both are limited, or no site fits.

    Example:
        >>> from peft import LoraConfig
        >>> sites = [Site("a", 5, 5), Site("b", 5, 5), Site("c", 10, 10)]
        >>> site_budget(sites, LoraConfig(r=1), Limits(adapters=2)).choose([1.0, 2.0, 3.0])
        [1, 2]
        >>> site_budget(sites, LoraConfig(r=1), Limits(parameters=0.5)).choose([1.0, 2.0, 3.0])
        [2]
    """
    if limits.adapters is not None and limits.parameters is not None:
        raise OptionError(f"{limits.text}: this method keeps whole adapters; limit adapters or parameters, not both")
    limits.warn_of_all(stacklevel=4)
    budget = chooser_of(sites, Costs.of(sites, lora), limits, "score")
    assert isinstance(budget, Budget), "neither measured nor spread"
    return budget


def rank_budget(costs: Costs, limits: Limits) -> Budget:
    """Return the budget that single ranks are chosen within.

    Raises:
        OptionError: Time or memory is limited, both adapters and parameters are, or not even one rank fits.
    """
    limits, n = limits.limits, len(costs.ranks)
    if limits.are_measured or len(limits.asked) > 1:
        raise OptionError(
            f"single ranks are chosen within adapters or parameters alone, not within {limits.text}; give one of them, "
            "or a rule that scores sites"
        )
    k = limits.k_of(n)
    if k is not None:
        return Budget.of_count(k, n=n)
    _require_one_rank(range(n), costs, limits)
    return Budget(costs.adapters, _most(costs, limits), costs.fixed)


def spread_order(sites: Sequence[Site]) -> list[int]:
    """Return all positions in an order of which any beginning is spread over projections and depth.

    Of each projection the blocks come in van der Corput's order (0, 1/2, 1/4, 3/4, ...), which begins at another depth
    for each projection.

    Example:
        >>> sites = [Site(f"layer.{i}.{kind}", 4, 4) for i in range(4) for kind in "kq"]
        >>> [sites[i].name[6:] for i in spread_order(sites)]
        ['0.k', '2.q', '2.k', '0.q', '1.k', '3.q', '3.k', '1.q']
    """
    kinds: dict[str, list[int]] = {}
    for i in sorted(range(len(sites)), key=lambda i: natural(sites[i].name)):
        kind = sites[i].projection
        kinds.setdefault("" if kind.isdigit() else kind, []).append(i)  # layers of an nn.Sequential are of one kind
    turns: dict[int, tuple[float, int]] = {}
    for kind, places in enumerate(kinds.values()):
        shift = kind * len(places) // len(kinds)
        order = sorted(range(len(places)), key=lambda d: _van_der_corput_place((d - shift) % len(places), len(places)))
        for turn, depth in enumerate(order):
            turns[places[depth]] = ((turn + 0.5) / len(places), kind)
    return sorted(turns, key=lambda i: turns[i])


def _van_der_corput_place(depth: int, n: int) -> float:
    """The bits of depth/n in reverse order."""
    value, unit, left = 0.0, 1.0, depth / n
    for bit in range(20):
        left *= 2
        if left >= 1:
            left -= 1
            value += unit * 2**bit
    return value


def _filled(order: Sequence[int], costs: Costs, limits: Limits) -> list[int]:
    """The same share of the user's rank on each site of ``order``; from rank 1, rank 2 on the first that fit."""
    ranks = [0] * len(costs.ranks)
    if not order:
        return ranks
    _require_one_rank(order, costs, limits)
    most, growth = _most(costs, limits), _growth(order, costs, limits)
    top = max(costs.ranks[i] for i in order)
    highest = {i: most if growth is None else int(costs.ranks[i] * growth) for i in order}

    def at(share: int) -> list[int]:
        for i in order:
            ranks[i] = min(max(costs.ranks[i] * share // top, 1), highest[i]) if share else 0
        return ranks

    low, high = 0, most + 1  # a share is the rank of the site with the highest one, which is at most its parameters
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs.parameters(at(middle)) <= most else (low, middle)
    left = most - costs.parameters(at(low))
    for i in order if max(ranks) <= 1 else ():
        price = costs.of_rank[i] if ranks[i] else costs.adapter(i, 1)
        if price <= left and ranks[i] < highest[i]:
            ranks[i] += 1
            left -= price
    return ranks


def _growth(kept: Sequence[int], costs: Costs, limits: Limits) -> Fraction | None:
    """How many times the user's rank these sites may have; None where only parameters limit it."""
    if limits.frees_ranks or costs.frees_steps:
        return Fraction(1)
    own = [(limit - cost.of(kept), cost.in_adapters(kept)) for cost, limit in _measured(costs, limits)]
    return min((1 + Fraction(left, taken) for left, taken in own if taken), default=None)


def _most(costs: Costs, limits: Limits) -> int:
    """The most parameters of the sites' adapters, where they are limited."""
    most = limits.parameters_of(sum(costs.adapters), costs.besides)
    assert most is not None, "parameters are limited"
    return most


def _measured(costs: Costs, limits: Limits) -> list[tuple[Cost, int]]:
    """The measured costs with their limits in nanoseconds and bytes."""
    found: list[tuple[Cost, int]] = []
    if costs.time is not None and (nanoseconds := limits.time_of(costs.time.of_all)) is not None:
        found.append((costs.time if costs.run is None else costs.run.cost, nanoseconds))
    if costs.memory is not None and limits.bytes is not None:
        found.append((costs.memory, limits.bytes))
    return found


def _require_one_rank(places: Iterable[int], costs: Costs, limits: Limits) -> None:
    """Raise where parameters do not pay for rank 1 at one of these sites.

    Raises:
        OptionError: With what the cheapest takes.
    """
    least, most = min(costs.adapter(i, 1) for i in places), _most(costs, limits)
    if least > most:
        raise OptionError(
            f"no adapter fits {limits.text}: rank 1 at one site takes {least:,} parameters, and {most:,} are left for "
            "it; raise parameters"
        )


def _what_is_missing(sites: Sequence[Site], costs: Costs, limits: Limits, bounds: Sequence[tuple[Cost, int]]) -> str:
    """What the cheapest site takes of the first measured cost that it exceeds."""
    for cost, limit in bounds:
        name, least = sites[cost.cheapest].name, cost.of([cost.cheapest])
        if least > limit and costs.run is not None and costs.time is not None and cost is costs.run.cost:
            text = f": the cheapest, {name}, takes {least / costs.time.of_all:.3f} of LoRA's time in this run, with "
            text += "the selection and the first epoch's forward passes; raise time"
            steps = limits.time_of(costs.run.steps or 0)
            return text + (f", or train LoRA on all sites for {steps:,} steps, which take as long" if steps else "")
        if least > limit and cost is costs.time:
            return f": the cheapest, {name}, takes {least / cost.of_all:.3f} of LoRA's step time; raise time"
        if least > limit:
            return f": with one adapter, at {name}, the peak is {least / 1e9:.3f} GB; raise memory, or lower the batch"
    return ": sites that are fast enough take too much memory, and the others too much time; raise one of them"


def _of_ranks(scores: SiteScores | RankScores) -> TypeIs[RankScores]:
    return bool(scores) and isinstance(scores[0], Sequence)
