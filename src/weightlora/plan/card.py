"""The model card of an adapter: a table of its plan, and the heat map as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightlora.errors import MissingPackageError
from weightlora.plan.heatmap import draw_heatmap
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.projection_order import ordered_projections
from weightlora.text import in_code, in_markdown

CARD_FILE, PICTURE_FILE = "README.md", "plan.png"


def write_card(folder: Path, plan: AdapterPlan) -> None:
    """Add the plan to the card that PEFT wrote, with ``plan.png`` beside it; without matplotlib there is no picture.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote.
        plan: The adapter's.

    Raises:
        OutputError: The folder cannot be written.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / CARD_FILE)
    data: Any = card.data
    data.tags = sorted({*(data.tags or []), "lora", "weightlora"})
    lines = ["## Selection", "", f"Rule `{in_code(plan.rule)}`, seed {plan.seed}: {_summary(plan)}.", ""]
    if _drawn(plan, folder / PICTURE_FILE):
        lines += [f"![Heat map of the scores by layer and projection. {_summary(plan)}.]({PICTURE_FILE})", ""]
    card.text += "\n\n" + "\n".join([*lines, *_table(plan)]) + "\n"
    card.save(folder / CARD_FILE)


def _summary(plan: AdapterPlan) -> str:
    return (
        f"{len(plan.names)} of {len(plan.entries)} sites, {plan.parameters:,} adapter parameters "
        f"(LoRA on all: {plan.lora_parameters:,})"
    )


def _drawn(plan: AdapterPlan, path: Path) -> bool:
    try:
        draw_heatmap(plan, path)
    except MissingPackageError:  # training needs no matplotlib
        return False
    return True


def _table(plan: AdapterPlan) -> list[str]:
    lines = ["| projection | sites kept | rank | layers |", "| --- | --- | --- | --- |"]
    for projection in ordered_projections(entry.site.projection for entry in plan.entries):
        sites = [entry for entry in plan.entries if entry.site.projection == projection]
        kept = [entry for entry in sites if entry.r > 0]
        ranks = ", ".join(str(r) for r in sorted({entry.r for entry in kept})) or "–"
        numbers = {entry.site.block.rpartition(".")[2] for entry in kept if entry.site.block}
        layers = " ".join(sorted(numbers, key=lambda number: (len(number), number))) or "–"
        lines.append(f"| {in_markdown(projection)} | {len(kept)} of {len(sites)} | {ranks} | {layers} |")
    return lines
