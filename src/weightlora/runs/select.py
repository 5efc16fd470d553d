"""A recipe → its plan, and nothing else: what ``weightlora select`` does."""

from __future__ import annotations

import os
from copy import copy
from dataclasses import replace

from weightlora.errors import OptionError
from weightlora.files import only_writer, scratch_folder, written
from weightlora.folders import own_files
from weightlora.plan.plan import AdapterPlan
from weightlora.runs.files import HEATMAP_FILE, KNEE_FILE
from weightlora.runs.output import SELECT, require_output
from weightlora.runs.recipe import Recipe
from weightlora.runs.train import plan, prepare
from weightlora.trainer.guard import PLAN_FILE


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
