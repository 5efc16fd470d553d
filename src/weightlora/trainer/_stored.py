"""The plan that a trainer's folder holds, and the weights that a run with warm_start starts from.

A plan holds no tensors, so that the weights have a file of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from weightlora.errors import OptionError
from weightlora.files import whole_file
from weightlora.model.distributed import from_first
from weightlora.plan.plan import ADAPTER_FILES, AdapterPlan
from weightlora.trainer._question import differences

_LOG = logging.getLogger(__name__)

START_FILE = "warm_start.safetensors"


def stored_plan(path: Path, question: Mapping[str, Any]) -> AdapterPlan | None:
    """Return the plan that an earlier start made for the same question; None where there is none.

    A plan for another question that nothing was trained with is None, too, with a warning in the log.

    Args:
        path: Of the plan's file.
        question: See :func:`weightlora.trainer._question.question_of`.

    Raises:
        OptionError: A training beside it used a plan for another question, or the plan does not say for which.
    """
    if not path.exists():
        return None
    plan = AdapterPlan.load(path)
    advice = "choose another output_dir, or delete that file"
    if not plan.question:
        raise OptionError(
            f"{path} does not record what it was made for (select() and --plan do not say): train it with "
            f"plan.attach(model) or weightlora train --plan, {advice}"
        )
    faults = differences(plan.question, question)
    if not faults:
        return plan
    other = f"{path} was made for something else ({'; '.join(faults)})"
    if _has_training(path.parent):
        raise OptionError(f"{other}; {advice}")
    _LOG.warning("%s, and nothing is trained with it: it is replaced", other)
    return None


def keep_plan(plan: AdapterPlan, path: Path) -> None:
    """Write the plan; one that a trainer wrote, and nothing was trained with, is replaced.

    Raises:
        OptionError: There is another.
    """
    there = AdapterPlan.load(path) if path.exists() else None
    if there is None or (there.question and not _has_training(path.parent)):
        plan.save(path)
    elif there.ranks != plan.ranks:
        raise OptionError(f"{path} is another plan; choose another output_dir, or delete that file")


def _has_training(folder: Path) -> bool:
    """Whether a checkpoint or an adapter is in the folder."""
    return get_last_checkpoint(str(folder)) is not None or any((folder / name).exists() for name in ADAPTER_FILES)


def write_start(model: nn.Module, path: Path) -> None:
    """Write all trained parameters of ``model``; a failed write leaves no file.

    Raises:
        OutputError: The folder cannot be written.
    """
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    with whole_file(path) as draft:
        try:
            save_file(weights, str(draft))
        except SafetensorError as error:  # raised when the disk is full
            raise OSError(str(error)) from error


@torch.no_grad()
def read_start(path: Path, model: nn.Module) -> None:
    """Overwrite the trained parameters of ``model`` by those in the file; the first process reads it for all.

    Raises:
        OptionError: The file is missing or is not that of this model.
    """

    def read() -> dict[str, torch.Tensor]:
        try:
            return load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise OptionError(
                f"{path.parent} has a plan made with warm_start=True, but {path.name} cannot be read ({error}), so its "
                "adapters cannot start from the scoring's weights; choose another output_dir, or delete the plan to "
                "score the sites again"
            ) from error

    weights = from_first(read)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
        raise OptionError(
            f"{path} holds other weights than this model trains; choose another output_dir, or delete it and the plan"
        )
    for name, value in weights.items():
        parameters[name].copy_(value)
