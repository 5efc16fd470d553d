"""The trained adapter's folder: stock PEFT, with the plan and a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.folders import own_files, whole_folder
from weightlora.model.distributed import is_first
from weightlora.plan.card import CARD_FILE, write_card
from weightlora.plan.from_adapter import ADAPTER_FILES
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import write_base_model_name
from weightlora.runs.output import TRAIN
from weightlora.trainer.guard import PLAN_FILE

if TYPE_CHECKING:
    from transformers import Trainer


def save_adapter(trainer: Trainer, plan: AdapterPlan, path: Path) -> None:
    """Write the trained adapter as a stock PEFT folder with its plan and card, whole or not at all."""
    found: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on all processes: each may hold a shard
    if not is_first():  # DeepSpeed gives the others nothing
        return
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in found.items()}  # torch.compile's prefix
    with whole_folder(path, TRAIN) as draft:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)  # type: ignore[arg-type]
        model.save_pretrained(str(draft), state_dict=weights)
        write_base_model_name(draft, model)
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(draft))
        plan.save(draft / PLAN_FILE)
        write_card(draft, plan, model)


def write_metrics(trainer: Trainer, plan: AdapterPlan, path: Path, metrics: Mapping[str, float]) -> None:
    """Write the card of a saved adapter anew, with what was measured."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)  # type: ignore[arg-type]
    if is_first():
        with own_files(path, TRAIN) as draft:
            for name in (CARD_FILE, ADAPTER_FILES[0], "tokenizer_config.json"):  # what the card is made of
                if (path / name).exists():
                    shutil.copyfile(path / name, draft / name)
            write_card(draft, plan, model, metrics=metrics)
