"""The trained adapter's folder: stock PEFT, with the plan and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.files import whole_folder
from weightlora.model.distributed import is_first
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.projection_order import ordered_projections
from weightlora.plan.provenance import write_base_model_name
from weightlora.text import in_code, in_markdown
from weightlora.trainer.guard import PLAN_FILE

if TYPE_CHECKING:
    from transformers import Trainer


def save_adapter(trainer: Trainer, plan: AdapterPlan, path: Path) -> None:
    """Write the trained adapter as a stock PEFT folder with its plan and card, whole or not at all."""
    found: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on all processes: each may hold a shard
    if not is_first():  # DeepSpeed gives the others nothing
        return
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in found.items()}  # torch.compile's prefix
    with whole_folder(path) as draft:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)  # type: ignore[arg-type]
        model.save_pretrained(str(draft), state_dict=weights)
        write_base_model_name(draft, model)
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(draft))
        plan.save(draft / PLAN_FILE)
        _write_card(draft / "README.md", plan)


def _write_card(path: Path, plan: AdapterPlan) -> None:
    """Add a table of the plan to the card that PEFT wrote."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    data: Any = card.data
    data.tags = sorted({*(data.tags or []), "lora", "weightlora"})
    lines = [
        "## Selection",
        "",
        f"Rule `{in_code(plan.rule)}`, seed {plan.seed}: {len(plan.names)} of {len(plan.entries)} sites, "
        f"{plan.parameters:,} adapter parameters (LoRA on all: {plan.lora_parameters:,}).",
        "",
        "| projection | sites kept | rank | layers |",
        "| --- | --- | --- | --- |",
    ]
    for projection in ordered_projections(entry.site.projection for entry in plan.entries):
        sites = [entry for entry in plan.entries if entry.site.projection == projection]
        kept = [entry for entry in sites if entry.r > 0]
        ranks = ", ".join(str(r) for r in sorted({entry.r for entry in kept})) or "–"
        numbers = {entry.site.block.rpartition(".")[2] for entry in kept if entry.site.block}
        layers = " ".join(sorted(numbers, key=lambda number: (len(number), number))) or "–"
        lines.append(f"| {in_markdown(projection)} | {len(kept)} of {len(sites)} | {ranks} | {layers} |")
    card.text += "\n\n" + "\n".join(lines) + "\n"
    card.save(path)
