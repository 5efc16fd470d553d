"""The callback of methods that act during training; it saves their state and warns if it is missing.

A mover's averages and masks are written to ``checkpoint-N/method_state.safetensors``, never into the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import DataError, OptionError, WeightLoraWarning
from weightlora.files import whole_file
from weightlora.model.distributed import from_first, require_equal

STATE_FILE = "method_state.safetensors"


class Mover(Protocol):
    """A method's actions during training."""

    def begin(self, total_steps: int) -> None:
        """Act before the first step of a training of ``total_steps``."""
        ...

    def before_step(self, step: int) -> None:
        """Act before optimizer step ``step`` (1-based), when gradients are clipped."""
        ...

    def after_step(self, step: int) -> None:
        """Act after optimizer step ``step`` (1-based), before gradients are cleared."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed training needs besides the weights."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set what :meth:`state` returned."""
        ...


class MoverCallback(TrainerCallback):
    """Makes a trainer call a mover in each optimizer step, also under accumulation, and saves the mover's state."""

    def __init__(self, mover: Mover) -> None:
        self.mover = mover

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or resume from the checkpoint that the trainer has loaded.

        Raises:
            OptionError: The weights of another step would be loaded at the end.
            DataError: The checkpoint has no state of the method, or a damaged one.
        """
        if args.load_best_model_at_end:
            raise OptionError(
                "load_best_model_at_end would end with the ranks of an earlier step, over the budget; leave it out"
            )
        self.mover.begin(state.max_steps)
        if state.global_step > 0:
            _restore(self.mover, _state_path(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare what the processes have trained.

        Raises:
            SelectionError: They have trained different adapters.
        """
        require_equal([p for p in kwargs["model"].parameters() if p.requires_grad], "what was trained")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the mover before the step."""
        self.mover.before_step(state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the mover after the step; the trainer has not counted it yet."""
        self.mover.after_step(state.global_step + 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the mover's state in the checkpoint."""
        if state.is_world_process_zero:
            write_state(self.mover.state(), _state_path(args, state))


def write_state(state: dict[str, Tensor], path: Path) -> None:
    """Write a mover's state, whole or not at all."""
    from safetensors.torch import save_file

    with whole_file(path) as draft:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft)


def take_up(callbacks: Sequence[TrainerCallback], checkpoint: Path, total_steps: int) -> None:
    """Restore movers from ``checkpoint``, the last of a training of ``total_steps``, without a trainer.

    Raises:
        DataError: The checkpoint has no state of the method, or a damaged one.
    """
    for callback in callbacks:
        if isinstance(callback, MoverCallback):
            callback.mover.begin(total_steps)
            _restore(callback.mover, checkpoint / STATE_FILE)


def warn_unless_begun(modules: Sequence[nn.Module], what: str) -> Callable[[], None]:
    """Warn once if one of ``modules`` is trained before the returned function was called.

    Args:
        modules: The tuner and the model in it; the model's task decides which of them is called.
        what: Name of the method.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> begin = warn_unless_begun([layer], "a method")
        >>> begin()
        >>> layer(torch.ones(1, 1)).shape
        torch.Size([1, 1])
    """

    def check(module: nn.Module, _inputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            remove()
            warnings.warn(
                f"{what} is being trained, but its callback is missing: give the trainer callbacks=method.callbacks(), "
                "or call begin(), before_step() and after_step() of the callback's mover in your loop",
                WeightLoraWarning,
                stacklevel=2,
            )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    handles = [module.register_forward_pre_hook(check) for module in modules]
    return remove


def _restore(mover: Mover, path: Path) -> None:
    state = from_first(partial(_read, path))  # other nodes may have no such file
    try:
        mover.restore(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or of another run: {type(error).__name__}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path} is missing: training cannot resume without the method's averages and masks")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:  # cut off
        raise DataError(f"{path} is damaged or of another run: {type(error).__name__}: {error}") from error


def _state_path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE
