"""A plan by layer and projection: as a grid, and as a picture."""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.errors import require_extra
from weightlora.files import whole_file
from weightlora.plan._data import PlanData, PlannedSite
from weightlora.text import natural, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Words in the name of an attention over another sequence, in lower case and without underscores.
_CROSS = ("crossattention", "crossattn", "encdecattention", "encoderattn", "encoderattention")

#: The last words of attention's projections in the order of the forward pass.
_ATTENTION = (
    {"c_attn", "qkv", "qkv_proj", "query_key_value", "wqkv", "in_proj"},  # query, key and value in one matrix
    {"q", "query", "q_proj", "query_proj", "q_lin", "q_attn", "q_a_proj", "wq"},
    {"q_b_proj"},
    {"k", "key", "k_proj", "key_proj", "k_lin", "kv_a_proj_with_mqa", "wk"},
    {"v", "value", "v_proj", "value_proj", "v_lin", "kv_b_proj", "wv"},
    {"pos_key_proj", "pos_proj"},
    {"pos_query_proj", "pos_q_proj"},
    {"o", "output", "o_proj", "out_proj", "c_proj", "out_lin", "dense", "wo"},
)
#: Those of the MLP.
_MLP = (
    {"gate", "gate_proj", "gate_up_proj", "wi_0", "w1"},
    {"up", "up_proj", "wi_1", "w3"},
    {"intermediate", "c_fc", "fc1", "fc_in", "lin1", "wi", "dense_h_to_4h", "ffn"},
    {"down", "down_proj", "output", "c_proj", "fc2", "fc_out", "lin2", "wo", "w2", "dense_4h_to_h", "ffn_output"},
)


#: What each set above computes, in the same order.
_ATTENTION_ROLES = ("qkv", "query", "query", "key", "value", "position", "position", "output")
_MLP_ROLES = ("gate", "up", "up", "down")


def projection_key(projection: str) -> tuple[int, int, str]:
    """Return a sort key that puts a block's projections in the order of the forward pass.

    Self-attention comes first (query, key, value, output), then cross-attention, then the MLP (gate, up, down). Names
    of BERT, RoBERTa, ALBERT, DeBERTa, DistilBERT, ViT, Llama, Qwen, Mistral, Mixtral, DeepSeek, Phi, Falcon, GPT-2,
    GPT-J, GPT-NeoX, OPT, T5 and BART are known. Unknown names follow in alphabetical order.

    Args:
        projection: A site's name inside its block, :attr:`weightlora.model.sites.Site.projection`.

    Example:
        >>> sorted(["mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj"], key=projection_key)
        ['self_attn.q_proj', 'self_attn.o_proj', 'mlp.down_proj']
    """
    words = projection.lower().split(".")
    if len(words) > 1 and words[-1] == "dense" and words[-2] in ("output", "intermediate"):  # BERT's
        words = words[:-1]
    parents, last = [word.replace("_", "") for word in words[:-1]], words[-1]
    if any(word in _CROSS for word in parents):
        part, places = 1, _ATTENTION
    elif any("attention" in word or "attn" in word for word in parents):
        part, places = 0, _ATTENTION
    elif any(last in names for names in _MLP):
        part, places = 2, _MLP
    else:  # such as "q_proj" alone; "dense" alone may be anything
        part, places = 0, _ATTENTION[:-1]
    place = next((i for i, names in enumerate(places) if last in names), None)
    return (3, 0, projection) if place is None else (part, place, projection)


def projection_role(projection: str) -> tuple[str, str]:
    """Return the part of the block that a projection belongs to, and its role there.

    The parts are ``attention``, ``cross-attention``, ``mlp`` and ``other``. Roles in attention are ``query``, ``key``,
    ``value``, ``qkv`` (all three in one matrix), ``position`` and ``output``; in the MLP ``gate``, ``up`` and ``down``.

    Args:
        projection: As in :func:`projection_key`, which lists the models whose names are known.

    Example:
        >>> projection_role("self_attn.v_proj"), projection_role("attention.output.dense")
        (('attention', 'value'), ('attention', 'output'))
        >>> projection_role("output.dense"), projection_role("classifier")
        (('mlp', 'down'), ('other', 'other'))
    """
    part, place, _ = projection_key(projection)
    if part == 3:
        return "other", "other"
    return ("attention", "cross-attention", "mlp")[part], (_MLP_ROLES if part == 2 else _ATTENTION_ROLES)[place]


def ordered_projections(projections: Iterable[str]) -> list[str]:
    """Return the distinct projections in the order of the forward pass; see :func:`projection_key`.

    Example:
        >>> ordered_projections(["output.dense", "intermediate.dense", "attention.self.key", "attention.self.key"])
        ['attention.self.key', 'intermediate.dense', 'output.dense']
    """
    return sorted(set(projections), key=projection_key)


#: Characters of a name of the user's, on the screen and in the picture; the end of a longer one is shown.
_LONGEST, _IN_PICTURE = 60, 40


@dataclass(frozen=True)
class Shade:
    """One site in the heat map."""

    level: float
    """Score scaled to [0, 1] over the plan; 0 where all scores are equal."""
    entry: PlannedSite


@dataclass(frozen=True)
class Heatmap:
    """What is drawn: a row for each layer, a column for each projection, both in the order of the forward pass."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Shade | None, ...], ...]
    """None where a layer has no such site."""


def make_heatmap(plan: PlanData) -> Heatmap:
    """Return the plan's sites as a grid of layers and projections.

    Example:
        >>> from weightlora import AdapterPlan
        >>> from weightlora.model.sites import Site
        >>> grid = make_heatmap(AdapterPlan((
        ...     PlannedSite(Site("layer.0.q", 8, 8), 4, 8, r=0, alpha=8, score=1.0),
        ...     PlannedSite(Site("layer.1.q", 8, 8), 4, 8, r=4, alpha=8, score=3.0),
        ... )))
        >>> grid.rows, grid.columns, [row[0].level for row in grid.cells]
        (('0', '1'), ('q',), [0.0, 1.0])
    """
    blocks = sorted({entry.site.block for entry in plan.entries}, key=natural)
    columns = ordered_projections(entry.site.projection for entry in plan.entries)
    low = min(entry.score for entry in plan.entries)
    span = max(entry.score for entry in plan.entries) - low
    found = {(e.site.block, e.site.projection): Shade((e.score - low) / span if span else 0.0, e) for e in plan.entries}
    return Heatmap(
        rows=short_blocks(blocks),
        columns=tuple(columns),
        cells=tuple(tuple(found.get((block, column)) for column in columns) for block in blocks),
    )


def short_blocks(blocks: Sequence[str]) -> tuple[str, ...]:
    """Return the blocks' names without their common beginning.

    Example:
        >>> short_blocks(["encoder.layer.1", "encoder.layer.10"])
        ('1', '10')
    """
    shared = len(re.sub(r"\d*$", "", os.path.commonprefix(blocks)))  # noqa: RUF071  (letters are meant)
    return tuple(block[shared:] or "–" for block in blocks)


def draw_heatmap(plan: PlanData, path: str | Path) -> None:
    """Write the grid as a PNG, PDF or SVG, by the path's ending, whole or not at all.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    grid = make_heatmap(plan)
    height, width = len(grid.rows), len(grid.columns)
    figure = new_figure(2.5 + 0.75 * width, 2.2 + 0.32 * height)
    axes = figure.subplots()
    levels = [[math.nan if cell is None else cell.level for cell in row] for row in grid.cells]
    image = axes.imshow(levels, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    cells = [(x, y, cell.entry.r) for y, row in enumerate(grid.cells) for x, cell in enumerate(row) if cell]
    kept = [(x, y, r) for x, y, r in cells if r > 0]
    across, down = [x for x, _, _ in kept], [y for _, y, _ in kept]
    axes.plot(across, down, "o", markersize=9, markerfacecolor="white", markeredgecolor="black")
    for x, y, r in kept:
        axes.text(x, y, str(r), ha="center", va="center_baseline", fontsize=6)
    columns, rows = ([shortened(name, _IN_PICTURE) for name in names] for names in (grid.columns, grid.rows))
    axes.set_xticks(range(width), columns, rotation=35, ha="right", fontsize=8, parse_math=False)  # $ is no formula
    axes.set_yticks(range(height), rows, fontsize=8, parse_math=False)
    axes.set_ylabel("layer")
    rule = shortened(plan.rule, _IN_PICTURE)
    title = f"{rule}: {len(plan.names)} of {len(plan.entries)} sites kept\n(circle: rank)"
    axes.set_title(title, size=9, parse_math=False)
    low, high = min(plan.scores.values()), max(plan.scores.values())
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"score: {rule}", parse_math=False)
    bar.set_ticks([0, 1], labels=[f"{low:.3g}", f"{high:.3g}"])
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty picture; no window is opened, and no state of matplotlib changes.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require_extra("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, PDF or SVG, by the path's ending, whole or not at all; the same plan gives the same bytes of a PNG.

    Raises:
        OutputError: The folder cannot be written.
    """
    with whole_file(path) as draft:  # matplotlib's version is not written into a PNG
        figure.savefig(draft, metadata={"Software": None} if draft.suffix.lower() == ".png" else None)


def shortened(name: str, longest: int = _LONGEST) -> str:
    """Return a name of the user's on one line; of a long one the end."""
    shown = " ".join(printable(name).splitlines())
    return shown if len(shown) <= longest else f"…{shown[1 - longest :]}"
