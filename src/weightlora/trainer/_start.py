"""The weights that a run with ``warm_start`` starts from, in ``output_dir`` beside its plan.

A plan holds no tensors. Without this file a second start of the run could not begin where the first one did.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from weightlora.errors import OptionError
from weightlora.files import whole_file
from weightlora.model.distributed import from_first

START_FILE = "warm_start.safetensors"


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
                "adapters cannot start from the warm-up; choose another output_dir, or delete the plan to run the "
                "warm-up again"
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
