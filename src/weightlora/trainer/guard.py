"""What keeps a trainer and its plan together: checks before, a callback during training, and what trackers are told.

A method may take the first steps of the training before the trainer, with its optimizer and into its first checkpoint.
"""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, WandbCallback
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState

from weightlora.errors import OptionError, SelectionError, WeightLoraError
from weightlora.model.checkpointing import remove_input_hooks, shorten_backward
from weightlora.model.gathering import require_loaded
from weightlora.model.layers import adapter_ranks, require_replaceable
from weightlora.model.sites import require_unwrapped
from weightlora.plan.card import CARD_FILE, write_base_model_name, write_card
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.stage import MakeStep, OptimizerStep
from weightlora.selection.trained import Begun
from weightlora.text import in_markdown
from weightlora.trainer.loader import is_parted, planned_steps

PLAN_FILE = "plan.json"
_TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


class PlanGuard(TrainerCallback):
    """Refuses to train without the plan, and tells trackers of it."""

    def __init__(self, trainer: Trainer) -> None:
        self.plan: AdapterPlan | None = None
        self.begun = 0
        """Steps of the training that the selection took."""
        self.ranks = _ranks(trainer)
        """Of the adapters before the selection."""
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise where there is no plan, or where the model's adapters are not the planned ones."""
        model = kwargs["model"]
        try:
            plan = self._planned(model)
            self._require_begun(args, state)
        except WeightLoraError:
            # train() has made it for the adapters as they are; the next call has to make it for those of the plan.
            self._trainer.optimizer = self._trainer.lr_scheduler = None
            raise
        shorten_backward(model)
        if state.global_step == self.begun:
            report_plan(self._trainer, plan, Path(str(args.output_dir)) / PLAN_FILE)

    def _require_begun(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.global_step < self.begun:
            raise OptionError(
                f"the selection took the first {self.begun} steps of this training, and train() would take them again; "
                f"call trainer.train(resume_from_checkpoint=True), which goes on from checkpoint-{self.begun} or a "
                f"later one in {args.output_dir}, or choose another output_dir"
            )

    def _planned(self, model: nn.Module) -> AdapterPlan:
        if self.plan is None:
            raise SelectionError(
                "the selection failed, so this trainer would train plain LoRA; select again, or make a new trainer"
            )
        if isinstance(model, PeftModel) and model.active_adapters != ["default"]:
            raise OptionError(
                f"the model's active adapter is {', '.join(model.active_adapters)}, and the plan is that of 'default'; "
                "call model.set_adapter('default') before train(), or make a new trainer without a plan"
            )
        self.plan.check(model)
        return self.plan

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
            model = kwargs["model"]
            write_base_model_name(folder, model)
            if (folder / CARD_FILE).exists():  # PEFT's template
                write_card(folder, self._plan, model, picture=False)
            self._plan.save(folder / PLAN_FILE)


def guarded(trainer: Trainer) -> PlanGuard:
    """Register and return the guard of a fresh trainer; it refuses to train until its plan is set.

    A guard that a failed selection left is used again.

    Raises:
        OptionError: See :func:`require_fresh`.
    """
    require_fresh(trainer)
    guard = _guard_of(trainer)
    if guard is None:
        guard = PlanGuard(trainer)
        trainer.add_callback(guard)
    return guard


def require_fresh(trainer: Trainer) -> None:
    """Raise where the trainer has a plan, an optimizer or steps behind it, or makes another model when it trains.

    Raises:
        OptionError: With what it has.
    """
    guard = _guard_of(trainer)
    if guard is not None and guard.plan is not None:
        raise OptionError("this trainer has a plan already; make a new trainer for a new plan")
    if guard is not None and guard.ranks != _ranks(trainer):
        raise OptionError(
            "a selection that failed has changed the adapters of this trainer's model; make a new trainer"
        )
    if trainer.model_init is not None:
        raise OptionError(
            "the trainer makes a new model in train() (model_init), which would not carry the plan; give model= in its "
            "place"
        )
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
        OptionError: There are none, both, or the model's are trained or would be lost.
        SiteError: The model is compiled, on the meta device, or was made under inference mode.
    """
    model: Any = trainer.model
    require_unwrapped(model)
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
    found = require_replaceable(model, "build the trainer on the base model and give lora=")
    others = [name for name in model.peft_config if name != "default" and not _is_reference(trainer, name)]
    if others:
        raise OptionError(
            f"the model has adapters default, {', '.join(others)}, and the plan replaces 'default' alone; delete the "
            "others (model.delete_adapter), or build the trainer on the base model and give lora="
        )
    return deepcopy(found)


def _is_reference(trainer: Trainer, adapter: str) -> bool:
    """Whether TRL's trainer made the adapter, a copy of a fresh "default": the same as no adapter at all."""
    return adapter == "ref" and any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)


def _guard_of(trainer: Trainer) -> PlanGuard | None:
    return next((each for each in trainer.callback_handler.callbacks if isinstance(each, PlanGuard)), None)


def _ranks(trainer: Trainer) -> dict[str, int]:
    model: Any = trainer.model
    return adapter_ranks(model)


# -- what the experiment trackers of ``report_to`` are told ----------------------------------------------------------


def plan_numbers(plan: AdapterPlan) -> dict[str, float]:
    """Return the numbers of a plan, by the names that a tracker shows.

    Example:
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import AdapterPlan, PlannedSite
        >>> sites = [PlannedSite(Site(name, 8, 8), 4, 8, r=r, alpha=8, score=1.0) for name, r in (("a", 4), ("b", 0))]
        >>> plan_numbers(AdapterPlan(tuple(sites)))
        {'plan/kept': 1, 'plan/sites': 2, 'plan/parameters': 64, 'plan/share_of_lora': 0.5}
    """
    return {
        "plan/kept": len(plan.names),
        "plan/sites": len(plan.entries),
        "plan/parameters": plan.parameters,
        "plan/share_of_lora": plan.parameters / plan.lora_parameters,
    }


def report_plan(trainer: Trainer, plan: AdapterPlan, path: Path) -> None:
    """Tell the trainer's trackers of ``plan``; without trackers nothing is logged.

    Args:
        trainer: One whose training begins.
        plan: The adapters that it trains.
        path: The plan's file.
    """
    trackers = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, _TRACKERS)]
    if not trackers:
        return
    trainer.log(plan_numbers(plan))
    if not trainer.is_world_process_zero():
        return
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            tracker.tb_writer.add_text("plan", _table(plan))
        elif isinstance(tracker, WandbCallback):
            _keep_file(path)


def _keep_file(path: Path) -> None:
    """Store the plan as an artefact of the current W&B run."""
    import wandb

    run: Any = wandb.run
    if run is not None and path.exists():
        run.log_artifact(str(path), name=f"plan-{run.id}", type="plan")


def _table(plan: AdapterPlan) -> str:
    """Site, rank and score, as Markdown."""
    rows = [f"| {in_markdown(e.site.name)} | {e.r} | {e.score:.4g} |" for e in plan.entries]
    return "\n".join(["| site | rank | score |", "| --- | --- | --- |", *rows])


# -- a training whose first steps are taken before ---------------------------------------------------------------------


def run_step(trainer: Trainer) -> MakeStep:
    """Return what makes the trainer's own optimizer and schedule for another model than its present one."""
    steps = planned_steps(trainer)

    def make(model: nn.Module) -> OptimizerStep:
        own = _optimizing(trainer, model, steps)
        by_metric = isinstance(own.lr_scheduler, ReduceLROnPlateau | GreedyLR)  # they act after evaluations
        scheduler: Any = None if by_metric else own.lr_scheduler
        return OptimizerStep(model, own.optimizer, scheduler, float(trainer.args.max_grad_norm or 0))

    return make


def write_checkpoint(trainer: Trainer, begun: Begun, plan: AdapterPlan) -> None:
    """Write the checkpoint from which ``trainer.train(resume_from_checkpoint=True)`` goes on after ``begun.steps``."""
    model: Any = trainer.model
    steps = planned_steps(trainer)
    own = _optimizing(trainer, model, steps)
    for name, parameter in model.named_parameters():
        if name in begun.optimizer:
            own.optimizer.state[parameter] = {**begun.optimizer[name]}
    if begun.scheduler:
        own.lr_scheduler.load_state_dict({**begun.scheduler})
        for group, rate in zip(own.optimizer.param_groups, own.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
    own.args = copy(trainer.args)
    # The training cannot go on without all of it, whatever the later checkpoints hold.
    own.args.save_only_model, own.args.push_to_hub, own.args.save_total_limit = False, False, None
    exported = [each for each in (*own.callback_handler.callbacks, own.control) if isinstance(each, ExportableState)]
    own.state = TrainerState(
        global_step=begun.steps,
        max_steps=steps,
        train_batch_size=trainer.args.train_batch_size,
        stateful_callbacks=exported,  # pyright: ignore[reportArgumentType]  # as the Trainer makes it
    )
    own.state.compute_steps(own.args, steps)
    own._save_checkpoint(model, trial=None)  # the only writer of all that train() reads
    PlanSaver(plan).on_save(own.args, own.state, own.control, model=model)


def require_whole(trainer: Trainer, name: str) -> None:
    """Raise where the trainer's optimizer cannot take steps before the training.

    Args:
        trainer: A fresh trainer.
        name: Of the method, for the error.

    Raises:
        OptionError: It is parted over processes, or scales its gradients.
    """
    if is_parted(trainer):
        raise OptionError(
            f"{name} takes the first steps of the training before it, and FSDP, DeepSpeed and tensor parallelism part "
            "the optimizer that goes on; select with method selected and rule='paper', or run it in one process or "
            "under DDP"
        )
    if trainer.accelerator.scaler is not None:
        raise OptionError(f"{name} takes the first steps of the training without fp16's scaling; give bf16=True")


def _optimizing(trainer: Trainer, model: nn.Module, steps: int) -> Any:
    """A copy of the trainer with an optimizer and a schedule for ``model``."""
    own: Any = copy(trainer)
    own.model, own.optimizer, own.lr_scheduler = model, None, None
    own.create_optimizer()
    own.create_scheduler(steps)
    return own
