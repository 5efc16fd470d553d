"""What keeps a trainer and its plan together: checks before, the stored plan, and a callback during training."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError, SelectionError
from weightlora.model.checkpointing import remove_input_hooks, shorten_backward
from weightlora.model.layers import require_replaceable
from weightlora.model.sites import require_uncompiled
from weightlora.model.weights import require_loaded
from weightlora.plan.lora_config import config_fields
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import write_base_model_name
from weightlora.trainer._trackers import report_plan

PLAN_FILE = "plan.json"


class PlanGuard(TrainerCallback):
    """Refuses to train without the plan, and tells trackers of it."""

    def __init__(self, trainer: Trainer) -> None:
        self.plan: AdapterPlan | None = None
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise where there is no plan, or where the model's adapters are not the planned ones."""
        if self.plan is None:
            raise SelectionError("the selection failed, so this trainer would train plain LoRA; make a new trainer")
        self.plan.check(kwargs["model"])
        shorten_backward(kwargs["model"])
        if state.global_step == 0:
            report_plan(self._trainer, self.plan, Path(str(args.output_dir)) / PLAN_FILE)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the backward pass short: DPO switches checkpointing off and on again after each forward pass."""
        remove_input_hooks(kwargs["model"])

    on_substep_end = on_step_begin


class PlanSaver(TrainerCallback):
    """Saves the plan into every checkpoint, after all that a method's callbacks write: with its plan it is whole."""

    def __init__(self, plan: AdapterPlan) -> None:
        self._plan = plan

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the plan into the checkpoint that was just written."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_base_model_name(folder, kwargs["model"])
            self._plan.save(folder / PLAN_FILE)


def guarded(trainer: Trainer) -> PlanGuard:
    """Register and return the guard of a fresh trainer; it refuses to train until its plan is set.

    Raises:
        OptionError: The trainer has a plan, an optimizer or steps behind it.
    """
    require_fresh(trainer)
    guard = PlanGuard(trainer)
    trainer.add_callback(guard)
    return guard


def require_fresh(trainer: Trainer) -> None:
    """Raise where the trainer has a plan, an optimizer or steps behind it.

    Raises:
        OptionError: With what it has.
    """
    if any(isinstance(callback, PlanGuard) for callback in trainer.callback_handler.callbacks):
        raise OptionError("this trainer has a plan already; make a new trainer for a new plan")
    if trainer.state.global_step > 0:
        raise OptionError(f"the trainer has trained {trainer.state.global_step} steps; make a new one and select first")
    if trainer.optimizer is not None:
        raise OptionError(
            "the trainer has an optimizer, which holds adapters that the plan may drop; pass no optimizers= and let "
            "the trainer make it, or plan with select() before the optimizer is made"
        )
    if trainer.model_wrapped is not trainer.model:
        raise OptionError("the trainer's model is wrapped already; select before anything prepares it")


def lora_of(trainer: Trainer, lora: LoraConfig | None) -> LoraConfig:
    """Return the adapters wanted: those of the model, freshly made, or ``lora``.

    Raises:
        OptionError: There are none, both, or the model's are trained.
        SiteError: The model is compiled, on the meta device, or was made under inference mode.
    """
    model: Any = trainer.model
    require_uncompiled(model)
    require_loaded(model)
    if not isinstance(model, PeftModel):
        if lora is None:
            raise OptionError(
                "the trainer's model has no LoRA adapters to choose from; wrap it with get_peft_model(model, "
                "LoraConfig(...)) first (peft_config=... in TRL), or give lora="
            )
        return deepcopy(lora)
    if lora is not None:
        raise OptionError("the trainer's model has LoRA adapters already; leave lora= out, or give the base model")
    return deepcopy(require_replaceable(model, "build the trainer on the base model and give lora="))


def stored_plan(path: Path, lora: LoraConfig, asked: Mapping[str, Any]) -> AdapterPlan | None:
    """Return the plan of an earlier start of the same run; None where there is none.

    Args:
        path: Of the plan's file.
        lora: The adapters wanted.
        asked: The options that the plan must have been made with; None stands for any value.

    Raises:
        OptionError: The plan was made with other options.
    """
    if not path.exists():
        return None
    plan = AdapterPlan.load(path)
    made = {
        "expand": False,
        "ranking": "score",
        "warm_start": False,
        "head_lr": plan.options.get("lr"),
        **plan.options,
        "rule": plan.rule,
        "seed": plan.seed,
    }
    wanted = {key: value for key, value in asked.items() if value is not None}
    changed = [key for key, value in wanted.items() if made.get(key) != value]
    faults = [f"{key}={made.get(key)!r} there, {wanted[key]!r} now" for key in changed]
    if dict(plan.lora) != config_fields(lora):
        faults.append("another LoraConfig")
    if faults:
        raise OptionError(
            f"{path} was made with other options ({'; '.join(faults)}); choose another output_dir, or delete that file"
        )
    return plan


def keep_plan(plan: AdapterPlan, path: Path) -> None:
    """Write the plan, unless another one is there.

    Raises:
        OptionError: There is another.
    """
    if path.exists() and AdapterPlan.load(path).ranks != plan.ranks:
        raise OptionError(f"{path} is another plan; choose another output_dir, or delete that file")
    plan.save(path)
