"""The paper's motivating example (section 2.1, Figure 2) on your model.

recipe → plan, and |⟨∂L/∂W_i(W0), s·B_i·A_i⟩| of each site's adapter trained alone → how far the two choices agree

Its pictures have a bar for each site, with a star where the plan keeps it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.plan.heatmap import new_figure, projection_key, save_figure, short_blocks
from weightlora.plan.plan import AdapterPlan
from weightlora.text import natural

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.runs.recipe import Recipe

#: Characters of the longest bar.
_WIDTH = 20


@dataclass(frozen=True)
class Overlap:
    """How many of K sites two choices among n share, and how many a random choice would share."""

    n: int
    k: int
    shared: int

    @property
    def jaccard(self) -> float:
        """|A∩B| / |A∪B|."""
        return self.shared / (2 * self.k - self.shared)

    @property
    def by_chance(self) -> float:
        """Sites that K random ones share with any K: the hypergeometric mean K²/n."""
        return self.k**2 / self.n

    @property
    def jaccard_by_chance(self) -> float:
        """Mean of the Jaccard index of a random choice."""
        return sum(self._chance(i) * i / (2 * self.k - i) for i in range(self.k + 1))

    @property
    def chance(self) -> float:
        """Probability that a random choice shares as many or more.

        Example:
            >>> overlap = Overlap(n=4, k=2, shared=2)
            >>> overlap.by_chance, round(overlap.chance, 4)
            (1.0, 0.1667)
        """
        return sum(self._chance(i) for i in range(self.shared, self.k + 1))

    def _chance(self, shared: int) -> float:
        ways = math.comb(self.k, shared) * math.comb(self.n - self.k, self.k - shared)
        return ways / math.comb(self.n, self.k)


@dataclass(frozen=True)
class DotProducts:
    """What was found: a number a site, and the plan that it is held against."""

    plan: AdapterPlan
    products: Mapping[str, float]
    """⟨∂L/∂W(W0), s·B·A⟩ of each of the plan's candidates, signed: negative went downhill."""

    @property
    def largest(self) -> tuple[str, ...]:
        """The K sites with the largest |product|, K as many as the plan keeps; ties go by name."""
        ranked = sorted(self.products, key=lambda name: (-abs(self.products[name]), name))
        return tuple(ranked[: len(self.plan.names)])

    @property
    def overlap(self) -> Overlap:
        """Of the plan's sites and :attr:`largest`."""
        shared = len(set(self.largest) & set(self.plan.names))
        return Overlap(n=len(self.products), k=len(self.plan.names), shared=shared)

    @property
    def by_chance_within(self) -> float:
        """Mean that a random choice shares if it keeps as many of each projection as the plan: Σ_p k_p·m_p/n_p.

        Products grow with the size of a site, and so do gates; what the two share beyond this is not size alone.
        """
        of = {entry.site.name: entry.site.projection for entry in self.plan.entries}
        kept, largest, all_of = (Counter(map(of.__getitem__, names)) for names in (self.plan.names, self.largest, of))
        return sum(kept[projection] * largest[projection] / count for projection, count in all_of.items())

    def to_json(self) -> dict[str, Any]:
        """The numbers, for a file."""
        overlap = self.overlap
        fields = ("n", "k", "shared", "jaccard", "by_chance", "jaccard_by_chance", "chance")
        sites = [
            {"name": name, "product": product, "kept": name in self.plan.names, "largest": name in self.largest}
            for name, product in self.products.items()
        ]
        numbers = {field: getattr(overlap, field) for field in fields}
        return {"overlap": {**numbers, "by_chance_within": self.by_chance_within}, "sites": sites}


def dot_product_study(recipe: Recipe) -> DotProducts:
    """Return how far each site's adapter moves along the frozen model's gradient when it is trained alone.

    The rows, the loss and the learning rate are those of the recipe's training; ``steps`` are taken with each adapter
    and the gradient is the mean over the same batches. The choice is the plan of the recipe: ``plan``, or what its
    method chooses on the spot, which leaves ``plan.json`` in ``output_dir``.

    Args:
        recipe: Model, task, method and training arguments.

    Raises:
        OptionError: An option does not fit, or the plan keeps all sites, so that there is nothing to compare.
        PlanMismatchError: The plan was made for another model.
    """
    from weightlora.methods.dot_product import dot_products
    from weightlora.model.distributed import process_count
    from weightlora.model.restore import seeded
    from weightlora.model.sites import find_sites, trained_modules
    from weightlora.runs.train import plan, prepare
    from weightlora.selection.batches import peeked
    from weightlora.selection.steps import HEAD_STEPS, check_steps, scoring_steps
    from weightlora.trainer.guard import lora_of
    from weightlora.trainer.loader import micro_batches, micro_loss, placed, quiet_copy, require_weights

    options, training = recipe.method, recipe.training
    steps = scoring_steps(None) if options.steps is None else check_steps(options.steps, least=1)
    if steps == "auto":
        raise OptionError("steps='auto' is not allowed: give the number of batches")
    study = prepare(recipe)
    trainer = study.trainer
    if process_count() > 1:
        raise OptionError("weightlora analyse is one process; start it without torchrun or accelerate")
    require_weights(trainer)
    lora = lora_of(trainer, None)
    rule = options.scored_by
    head_steps = HEAD_STEPS if rule is None or rule.head_steps is None else rule.head_steps
    chosen = plan(study).plan
    model: Any = trainer.model
    base = model.base_model.unload()
    sites = find_sites(base, lora).sites
    _require_comparable(chosen, {site.name for site in sites})
    quiet = quiet_copy(trainer)
    with seeded(training.seed):
        _, batches = peeked(micro_batches(quiet))
    with placed(trainer), seeded(training.seed):
        products = dot_products(
            base,
            lora,
            sites,
            batches,
            steps=steps,
            alone=True,
            learning_rate=training.learning_rate,
            head_steps=head_steps if trained_modules(lora) else 0,
            seed=training.seed,
            loss_fn=micro_loss(quiet),
        )
    return DotProducts(chosen, products)


def _require_comparable(plan: AdapterPlan, sites: set[str]) -> None:
    planned = set(plan.ranks)
    if planned != sites:
        name = sorted(planned ^ sites)[0]
        raise OptionError(
            f"the plan chose among {len(planned)} sites and the recipe has {len(sites)}, {name} is in one of them "
            "alone; give the lora_target_modules that the plan was made with"
        )
    if len(plan.names) == len(sites):
        raise OptionError(
            f"the plan keeps all of {len(sites)} sites, so that any choice agrees with it; lower adapters"
        )


# -- its pictures ------------------------------------------------------------------------------------------------------


def terminal_bars(found: DotProducts) -> Table:
    """Return a table of the sites and their products, the largest first; readable without colour."""
    from rich.box import SIMPLE
    from rich.table import Table

    largest = max(map(abs, found.products.values())) or 1.0
    title = f"single adapters along the frozen model's gradient; ★ kept by {found.plan.rule}"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("projection", no_wrap=True)
    table.add_column("⟨∇L, s·B·A⟩", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("★", justify="center", no_wrap=True)
    sites = _places(found)
    for place, name in enumerate(sorted(sites, key=lambda name: (-abs(found.products[name]), name)), start=1):
        bar = "█" * round(_WIDTH * abs(found.products[name]) / largest)
        star = "★" if name in found.plan.names else "·"
        last = place == len(found.plan.names)  # a line below the K largest
        table.add_row(str(place), *sites[name], f"{found.products[name]:.2e}", bar, star, end_section=last)
    return table


def overlap_text(found: DotProducts) -> str:
    """Return three lines: how far the plan agrees with the largest products, and two random choices for comparison."""
    overlap = found.overlap
    lines = (
        f"{overlap.shared} of the {overlap.k} sites with the largest products are kept by {found.plan.rule}; "
        f"Jaccard {overlap.jaccard:.2f}",
        f"at random: {overlap.by_chance:.1f} of {overlap.k} (K²/n, n = {overlap.n}); Jaccard "
        f"{overlap.jaccard_by_chance:.2f}; as many or more with probability {overlap.chance:.2g}",
        f"at random, but as many of each projection as {found.plan.rule} keeps: {found.by_chance_within:.1f} of "
        f"{overlap.k}",
    )
    return "\n".join(lines)


def draw_bars(found: DotProducts, path: str | Path) -> None:
    """Write the bars in the order of the forward pass as a PNG, PDF or SVG, by the path's ending, or nothing at all.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    figure = new_figure(2.5 + 0.2 * len(found.plan.entries), 4.5)
    from matplotlib.patches import Patch

    sites = _places(found)
    projections = {entry.site.name: entry.site for entry in found.plan.entries}
    names = sorted(sites, key=lambda n: (natural(projections[n].block), projection_key(projections[n].projection)))
    sizes = [abs(found.products[name]) for name in names]
    kept = [name in found.plan.names for name in names]
    axes = figure.subplots()
    axes.bar(range(len(names)), sizes, color=["#d95f02" if one else "#9aa5b1" for one in kept])
    stars = [i for i, one in enumerate(kept) if one]
    axes.plot(stars, [sizes[i] for i in stars], "*", color="black", markersize=6)
    axes.set_xticks(range(len(names)), [" ".join(sites[name]) for name in names], rotation=90, fontsize=7)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.set_ylabel("|⟨∇L(W0), s·B·A⟩|")
    overlap, rule = found.overlap, found.plan.rule
    axes.set_title(
        f"{overlap.shared} of the {overlap.k} largest are kept by {rule}; at random {overlap.by_chance:.1f}",
        size=9,
    )
    handles = [Patch(color="#d95f02", label=f"kept by {rule} (starred)"), Patch(color="#9aa5b1", label="not kept")]
    axes.legend(handles=handles, fontsize=7)
    save_figure(figure, path)


def _places(found: DotProducts) -> dict[str, tuple[str, str]]:
    """Return layer and projection of each site, by its name."""
    entries = found.plan.entries
    blocks = short_blocks([entry.site.block for entry in entries])
    return {entry.site.name: (block, entry.site.projection) for entry, block in zip(entries, blocks, strict=True)}
