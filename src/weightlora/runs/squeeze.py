"""A trained adapter and a recipe's rows → a squeezed adapter, weighted by the inputs of its sites, and its metrics."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.runs._load import make_trainer
from weightlora.runs._trainable import check_arguments
from weightlora.serving.moments import adapter_moments
from weightlora.serving.squeeze import Squeezed, require_possible, squeeze

if TYPE_CHECKING:
    from weightlora.runs.recipe import Recipe


def squeeze_on(
    recipe: Recipe, folder: Path, output_dir: Path, *, batches: int, **limits: Any
) -> tuple[Squeezed, dict[str, float], dict[str, float]]:
    """Squeeze the adapter in ``folder`` for the inputs of a recipe; return it, and the metrics before and after.

    Args:
        recipe: The base model, the training rows that weight the directions, and the rows that are measured, if any.
        folder: The adapter, of which the recipe's model is the base.
        output_dir: See :func:`weightlora.squeeze`.
        batches: Of the training rows, ``per_device_train_batch_size`` each.
        limits: See there.

    Raises:
        OptionError: An option does not fit.
        DataError: Rows or model are missing or malformed, or the adapter does not fit the model.
    """
    require_possible(folder, output_dir, **limits)
    check_arguments(recipe.training)
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        raise OptionError("load_in_4bit, load_in_8bit: squeeze runs the base model as it is; leave them out")
    task, trainer, _ = make_trainer(recipe, adapter=folder)
    model: Any = trainer.model
    before = task.measure(trainer)
    moments = adapter_moments(model, itertools.islice(trainer.get_train_dataloader(), batches))
    squeezed = squeeze(folder, output_dir, moments=moments, **limits)
    task, trainer, _ = make_trainer(recipe, adapter=output_dir)
    return squeezed, before, task.measure(trainer)
