"""A run's folder: what lies there from an earlier start, and where the run resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError
from weightlora.files import read_mapping, write_text
from weightlora.plan.plan import AdapterPlan
from weightlora.trainer.guard import PLAN_FILE

if TYPE_CHECKING:
    from transformers import Trainer

CONFIG_FILE = "config.yaml"
#: What a whole checkpoint holds at least; a run that was killed while it wrote one leaves less.
_CHECKPOINT_FILES = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json", PLAN_FILE)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def require_same_run(output: Path, settings: Mapping[str, Any]) -> None:
    """Raise where the folder holds a run with other options; one that has no plan yet has done nothing.

    Raises:
        OptionError: With the options that differ.
    """
    file = output / CONFIG_FILE
    if not (file.exists() and (output / PLAN_FILE).exists()):
        return
    there = read_mapping(file)
    changed = [key for key in sorted({*there, *settings}) if there.get(key) != settings.get(key)]
    faults = [f"{k}: {there.get(k)!r} there, {settings.get(k)!r} now" for k in changed if k != "resume_from_checkpoint"]
    if faults:
        raise OptionError(
            f"{output} holds a run with other options ({'; '.join(faults[:5])}); choose another output_dir"
        )


def write_config(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the effective options of a run."""
    import yaml

    write_text(output / CONFIG_FILE, yaml.safe_dump(dict(settings), allow_unicode=True, sort_keys=False))


def resume_point(output: Path, asked: Any, plan: AdapterPlan, *, sharded: bool) -> Path | None:
    """Return the checkpoint that a run resumes from; None where it starts.

    Args:
        output: The run's folder.
        asked: ``resume_from_checkpoint``: a folder; None or True stands for the last whole checkpoint in ``output``.
        plan: The run's plan; a checkpoint of another one is refused.
        sharded: Sharded runs cannot load a final checkpoint; they resume from the previous one.

    Raises:
        DataError: The checkpoint asked for is not whole, or belongs to another plan.
    """
    if asked is not None and str(asked).lower() != "true":
        folder = Path(str(asked))
        missing = [name for name in _CHECKPOINT_FILES if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} is no whole checkpoint of a planned run: it lacks {', '.join(missing)}")
        if AdapterPlan.load(folder / PLAN_FILE).ranks != plan.ranks:
            raise DataError(f"{folder} was trained on another plan than {output / PLAN_FILE}")
        return folder
    folders = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    whole = [folder for folder in folders if all((folder / name).is_file() for name in _CHECKPOINT_FILES)]
    whole = [folder for folder in whole if not (sharded and is_last(folder))]
    return whole[-1] if whole else None


def is_last(checkpoint: Path) -> bool:
    """Whether the training was over when ``checkpoint`` was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Give the trainer the weights and state of its final checkpoint; resuming there would train one more step."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    weights = load_file(Path(best or checkpoint) / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)
