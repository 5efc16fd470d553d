"""A recipe → base model, plan, trained stock adapter, metrics; or its plan alone. The same command resumes a run.

output_dir/config.yaml   the effective options, written once all of them are checked
output_dir/before.json   metrics of the base model, with eval_on_start
output_dir/plan.json     which sites carry adapters, as soon as it is known
output_dir/warm_start.safetensors  the weights that the training starts from, with warm_start
output_dir/batch.json    the batch that was found, with grow_batch
output_dir/checkpoint-*  the Trainer's own
output_dir/adapter/      the trained adapter: stock PEFT, with plan.json and a model card
output_dir/results.json  metrics, parameters and seconds, written last
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.files import only_writer, scratch_folder, write_json, written
from weightlora.folders import own_files, require_replaceable
from weightlora.methods import Method, entry_of, options_of
from weightlora.model.distributed import from_first, is_first
from weightlora.plan.plan import AdapterPlan
from weightlora.runs._checkpoint import resume, resume_point, whole_checkpoints
from weightlora.runs._folder import (
    push_adapter,
    remove_drafts_of_checkpoints,
    require_hub,
    require_same_run,
    save_adapter,
    stored_batch,
    stored_before,
    stored_results,
    write_config,
    write_metrics,
)
from weightlora.runs._load import make_trainer, require_candidates, with_plan
from weightlora.runs._trainable import (
    check_arguments,
    loss_fault,
    require_head,
    require_one_piece,
    require_trainable,
    use_head_rate,
)
from weightlora.runs.files import (
    ADAPTER,
    BATCH_FILE,
    BEFORE_FILE,
    HEATMAP_FILE,
    KNEE_FILE,
    RESULTS_FILE,
    SELECT,
    TRAIN,
    require_output,
)
from weightlora.runs.recipe import ADAPTER_RATE, Recipe
from weightlora.tasks import find_task
from weightlora.tasks.base import PreparedTask
from weightlora.trainer.attach import adopt, method_for
from weightlora.trainer.batch_size import Batch, grown_batch, require_growable, use_batch
from weightlora.trainer.guard import PLAN_FILE
from weightlora.trainer.loader import planned_epochs, require_measurable
from weightlora.trainer.store import store_planned

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A recipe with its trainer, before the plan is made."""

    recipe: Recipe
    task: PreparedTask
    trainer: Trainer
    rows: Mapping[str, int]
    """How many each split has."""


def train(recipe: Recipe, *, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run a recipe and return its results, which are also in ``output_dir/results.json``.

    When ``output_dir`` holds the same run, it resumes from its plan and its last whole checkpoint; when that run is
    finished, its results are returned.

    Args:
        recipe: What to run.
        callbacks: Further callbacks of the trainer.

    Raises:
        OptionError: ``output_dir`` holds another run, another process works there, or an option does not fit.
        DataError: Rows, model or checkpoint are missing or malformed.
        PlanMismatchError: The plan was made for another model.
        OutputError: ``output_dir`` belongs to another command, a file of the user would be lost, the disk is full, or a
            file cannot be written.
    """
    recipe = with_plan(recipe)
    output = recipe.output_dir
    settings = recipe.settings  # before there is a trainer: making training arguments resets accelerate's state
    with ExitStack() as stack, written(output):
        from_first(lambda: stack.enter_context(only_writer(output)))
        from_first(partial(remove_drafts_of_checkpoints, output))
        from_first(partial(require_same_run, output, settings))
        return from_first(partial(stored_results, output)) or _train(recipe, callbacks)


def _train(recipe: Recipe, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    from_first(partial(require_replaceable, recipe.output_dir / ADAPTER, TRAIN))
    run = prepare(recipe, callbacks)
    start = time.perf_counter()
    method = plan(run)
    planned = time.perf_counter()
    options = recipe.method
    if options.store_frozen is not None:
        folder = None if options.store_frozen == "memory" else options.store_frozen
        chosen = {"limit": options.store_limit, "dropout": options.store_dropout, "offload": options.store_offload}
        store_planned(run.trainer, method.plan, folder=folder, **chosen)
    from_first(lambda: write_config(recipe.output_dir, recipe.settings))  # a mistake leaves nothing behind
    before = _measured_before(run, method)
    begin = time.perf_counter()
    fit(run, method)
    seconds = {"selection_seconds": planned - start, "training_seconds": time.perf_counter() - begin}
    results = export(run, method, before=before, **{name: round(value, 2) for name, value in seconds.items()})
    fault = loss_fault(_logged(run.trainer), recipe.training.learning_rate)
    if fault is not None and is_first():
        warnings.warn(fault, WeightLoraWarning, stacklevel=2)
    return results


def select_plan(recipe: Recipe) -> AdapterPlan:
    """Return the plan that ``weightlora train`` would train, and write it to ``output_dir/plan.json``.

    The plan of an earlier call is replaced once the new one is made.

    Args:
        recipe: Model, task, method and training arguments.

    Raises:
        OptionError: This is one of several processes, another one works in ``output_dir``, or an option does not fit.
        DataError: Rows or model are missing or malformed.
        SelectionError: See :func:`weightlora.select`.
        OutputError: ``output_dir`` belongs to another command, a file of the user would be lost, the disk is full, or a
            file cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            f"weightlora select is one process, and this is one of {os.environ['WORLD_SIZE']}; start it without "
            "torchrun or accelerate, or let `weightlora train` select with all of them (docs/guides/distributed.md)"
        )
    if recipe.method.plan is not None:
        raise OptionError(
            f"plan={recipe.method.plan!r} is made already and weightlora select makes a new one; leave plan out, or "
            "train the plan with `weightlora train --plan`"
        )
    with only_writer(recipe.output_dir), written(recipe.output_dir):
        require_output(recipe.output_dir, SELECT, (PLAN_FILE, HEATMAP_FILE, KNEE_FILE))
        with scratch_folder(recipe.output_dir) as scratch:  # a trainer reuses the plan that it finds in its own folder
            training = copy(recipe.training)
            training.output_dir = str(scratch / "run")
            made = plan(prepare(replace(recipe, training=training), measured=False)).plan
        with own_files(recipe.output_dir, SELECT) as draft:
            made.save(draft / PLAN_FILE)
    return made


def prepare(
    recipe: Recipe, callbacks: Sequence[TrainerCallback] = (), *, measured: bool = True, few: int | None = None
) -> Run:
    """Return the run with model, rows and trainer loaded, and all options checked against them.

    Args:
        recipe: What to run.
        callbacks: Further callbacks of the trainer.
        measured: False loads the training rows only, for a run that is planned and not trained.
        few: Measure only so many rows of each split, for a run whose time is estimated.

    Raises:
        DataError: Rows or model are missing or malformed.
        OptionError: An option does not fit.
    """
    check_arguments(recipe.training)
    if recipe.training.push_to_hub:
        from_first(partial(require_hub, recipe.training.hub_token))
    _require_follows(recipe)
    if recipe.method.grow_batch and recipe.method.plan is None and entry_of(recipe.method.method).trains != "lora":
        raise OptionError(
            f"grow_batch: {recipe.method.method} does not train stock LoRA from beginning to end, whose memory is "
            "measured; leave grow_batch out"
        )
    if recipe.method.head_learning_rate is not None:
        require_head(recipe)
    task, trainer, rows = make_trainer(recipe, callbacks, measured=measured, few=few)
    if recipe.method.head_learning_rate is not None:
        require_one_piece(trainer)
    require_trainable(trainer, find_task(recipe.task.task).metrics)
    if recipe.training.eval_on_start:
        require_measurable(trainer)
    if recipe.method.grow_batch:
        require_growable(trainer)
    return Run(recipe, task, trainer, rows)


def _require_follows(recipe: Recipe) -> None:
    """Raise where an option does not go with a method that takes the first steps of the training.

    Raises:
        OptionError: With the option.
    """
    options = recipe.method
    if options.plan is not None or not entry_of(options.method).begins_training:
        return
    asked = {
        "eval_on_start": recipe.training.eval_on_start,
        "grow_batch": options.grow_batch,
        "head_learning_rate": options.head_learning_rate is not None,
    }
    for name, given in asked.items():
        if given:
            raise OptionError(
                f"{name}: method {options.method} takes the first steps of the training, as they are, before it; leave "
                f"{name} out, or give method selected and rule=paper, which selects before the training"
            )


def plan(run: Run) -> Method:
    """Return the recipe's method, its adapters on the trainer's model; the batch grows where the recipe says so.

    Raises:
        OptionError: An option does not fit, or ``output_dir`` holds another plan.
    """
    options, trainer = run.recipe.method, run.trainer
    if is_first():
        rate = run.recipe.training.learning_rate
        _LOG.info("learning rate %g%s", rate, " (default for adapters)" if rate == ADAPTER_RATE else "")
    if options.plan is not None:
        made = AdapterPlan.load(options.plan)
        require_candidates(options, made, trainer.model)  # pyright: ignore[reportArgumentType]
        method = adopt(trainer, made, seed=run.recipe.training.seed, fast=options.fast)
    else:
        given: dict[str, Any] = options.given
        if options.store_frozen is not None and "epochs" in options_of(options.method):
            given = {"epochs": planned_epochs(trainer), **given}
        method = method_for(trainer, options.method, fast=options.fast, **given)
    if options.grow_batch:
        output = run.recipe.output_dir  # a resumed run must not change its batch
        asked = Batch(trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps)
        stored = from_first(partial(stored_batch, output, asked))
        batch = stored or grown_batch(trainer, method.plan, fast=options.fast)
        if stored is None and is_first():
            write_json(output / BATCH_FILE, asdict(batch))
        use_batch(trainer, batch)
    return method


def fit(run: Run, method: Method) -> None:
    """Train, from the last whole checkpoint where there is one.

    Raises:
        DataError: The checkpoint asked for is not whole or belongs to another plan, or no checkpoint is whole.
    """
    trainer, recipe = run.trainer, run.recipe
    if recipe.method.head_learning_rate is not None:
        use_head_rate(trainer, recipe.method.head_learning_rate)
    asked = recipe.training.resume_from_checkpoint
    checkpoint = from_first(partial(resume_point, recipe.output_dir, asked, trainer, method))
    with whole_checkpoints(trainer):
        if checkpoint is None:
            trainer.train()
        else:
            resume(trainer, checkpoint, method)


def export(run: Run, method: Method, *, before: dict[str, Any] | None, **seconds: float) -> dict[str, Any]:
    """Save the adapter as stock PEFT, measure it, and return and write the results.

    Args:
        run: A run whose training is over.
        method: The run's.
        before: Metrics of the base model.
        seconds: Further numbers for the results.
    """
    trainer, recipe = run.trainer, run.recipe
    method.export(trainer.model)  # pyright: ignore[reportArgumentType]  # what is measured below is what is saved
    made = method.plan
    save_adapter(trainer, made, recipe.output_dir / ADAPTER)
    metrics = run.task.measure(trainer)
    write_metrics(trainer, made, recipe.output_dir / ADAPTER, metrics)
    if recipe.training.push_to_hub and is_first():
        push_adapter(recipe.output_dir / ADAPTER, trainer.hub_model_id, recipe.training)
    results = {
        "metrics": metrics,
        "before": before,
        "method": recipe.method.method if recipe.method.plan is None else "plan",
        "adapters": len(made.names),
        "sites": len(made.entries),
        "kept": list(made.names),
        "adapter_parameters": made.parameters,
        "lora_parameters": made.lora_parameters,
        **seconds,
        "steps": trainer.state.global_step,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
    }
    if is_first():
        write_json(recipe.output_dir / RESULTS_FILE, results)
    return results


def _logged(trainer: Trainer) -> list[float]:
    """The logged losses; NaN where the gradient was not finite: the Trainer hides such losses behind others' mean."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] if math.isfinite(entry.get("grad_norm", 0)) else math.nan for entry in entries]


def _measured_before(run: Run, method: Method) -> dict[str, Any] | None:
    """Metrics of the base model, measured once; None without ``eval_on_start``."""
    output = run.recipe.output_dir
    before = from_first(partial(stored_before, output))
    if run.recipe.training.eval_on_start and before is None:
        model: Any = run.trainer.model
        # Without warm_start B is zero: this is the base model as it is.
        with model.disable_adapter() if method.plan.options.get("warm_start") else nullcontext():
            before = run.task.measure(run.trainer)
        if is_first():
            write_json(output / BEFORE_FILE, before)
    return before
