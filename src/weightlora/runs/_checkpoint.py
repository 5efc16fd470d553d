"""The checkpoint that a run resumes from: it is whole, belongs to the run's plan, and holds all that training needs.

Everything that the Trainer will read is read here first. What it does not find, such as an optimizer's state, it
silently begins anew; damaged files make it fail with errors that do not name them.
"""

from __future__ import annotations

import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals
from transformers.training_args import OptimizerNames

from weightlora.errors import DataError, PlanError, WeightLoraError, WeightLoraWarning
from weightlora.files import read_json
from weightlora.methods import Method
from weightlora.methods.families.moving import STATE_FILE, MoverCallback, take_up
from weightlora.plan.plan import ADAPTER_FILES, AdapterPlan, tensor_shapes
from weightlora.runs.files import checkpoints, step_of
from weightlora.trainer.guard import PLAN_FILE

_STATE, _OPTIMIZER, _SCHEDULER, _SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
#: Of a process or a step, in the name of a file or folder.
_NUMBER = re.compile("[0-9]+")
#: Weights that the Trainer would load in the place of the adapter's.
_FOREIGN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resume_point(output: Path, asked: Any, trainer: Trainer, method: Method) -> Path | None:
    """Return the checkpoint that a run resumes from; None where it starts.

    A checkpoint without its plan, which is written last, is one that a killed run had not finished; it is left out.

    Args:
        output: The run's folder.
        asked: ``resume_from_checkpoint``: a folder; None or True stands for the last whole checkpoint in ``output``.
        trainer: The run's; its model carries the plan. A sharded one cannot load a final checkpoint; it resumes from
            the previous one.
        method: The run's.

    Raises:
        DataError: The checkpoint asked for is not whole or belongs to another plan, or none in ``output`` is whole.

    Warns:
        WeightLoraWarning: A checkpoint is damaged, and an earlier one is taken.
    """
    if asked is not None and str(asked).lower() != "true":
        _require_whole(Path(str(asked)), trainer, method)
        return Path(str(asked))
    faults: list[Exception] = []
    found: Path | None = None
    for folder in reversed(checkpoints(output)):
        if not (folder / PLAN_FILE).exists():
            continue
        try:
            _require_whole(folder, trainer, method)
        except (DataError, PlanError) as error:
            faults.append(error)
            continue
        if not (_sharded(trainer) and _is_last(folder)):
            found = folder
            break
    if faults and found is None:
        raise DataError(f"{faults[0]}; no checkpoint of {output} is whole: delete them to train from the start")
    for fault in faults:
        warnings.warn(f"{fault}; training resumes from {found}", WeightLoraWarning, stacklevel=2)
    return found


def resume(trainer: Trainer, checkpoint: Path, method: Method) -> None:
    """Train on from ``checkpoint``; where the training was over, take its weights and state."""
    if _is_last(checkpoint) and not _sharded(trainer):  # resuming there would train one more step
        trainer.state = _state_of(checkpoint)
        best = _best_of(checkpoint, trainer)
        set_peft_model_state_dict(trainer.model, load_file((best or checkpoint) / ADAPTER_FILES[1]))
        take_up(method.callbacks(), checkpoint, trainer.state.max_steps)
    else:
        trainer.add_callback(_BestBeside(checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint))


@contextmanager
def whole_checkpoints(trainer: Trainer) -> Generator[None]:
    """Let the training of the block write each checkpoint anew, and delete an old one only when the new one is whole.

    The Trainer deletes it before the callbacks write the plan and a method's state. A run that is killed in between
    would have no checkpoint to resume from.
    """
    limit = trainer.args.save_total_limit
    trainer.args.save_total_limit = None
    callback = _WholeCheckpoints(limit)
    trainer.add_callback(callback)
    try:
        yield
        callback.delete(trainer.args, trainer.state)  # also where the training was over already
        if limit == 1 and trainer.state.best_global_step is not None:  # as the Trainer does
            callback.delete(trainer.args, trainer.state, keep=(trainer.state.best_global_step,))
    finally:
        trainer.args.save_total_limit = limit


class _WholeCheckpoints(TrainerCallback):
    """Deletes the checkpoints that the Trainer would; added last, it acts when the others have written."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the card of a checkpoint that a killed start began: PEFT would keep what is there of it."""
        folder = _folder(args, state.global_step)
        if args.should_save and not (folder / PLAN_FILE).exists():
            (folder / "README.md").unlink(missing_ok=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete the oldest; the last and the best stay."""
        self.delete(args, state)

    def delete(self, args: TrainingArguments, state: TrainerState, keep: tuple[int | None, ...] = ()) -> None:
        """Delete the oldest checkpoints up to this step's. Those to ``keep`` stay, by default the last and the best."""
        if self._limit is None or not args.should_save:
            return
        steps = [step_of(folder) or 0 for folder in checkpoints(Path(str(args.output_dir)))]
        steps = [step for step in steps if step <= state.global_step]
        old = [step for step in steps if step not in (keep or (*steps[-1:], state.best_global_step))]
        doomed = old[: max(0, len(steps) - max(self._limit, len(steps) - len(old)))]
        for step in doomed:
            _remove(_folder(args, step), like=_folder(args, max({*steps} - {*doomed})))


def _remove(folder: Path, like: Path) -> None:
    """Remove what a checkpoint has like another one of the run; what the user put there stays."""
    alike = {_NUMBER.sub("", path.name) for path in like.iterdir()}
    # First the plan, without which a checkpoint is none.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != PLAN_FILE):
        if _NUMBER.sub("", path.name) not in alike:
            continue
        if path.is_dir() and not path.is_symlink():  # DeepSpeed's and FSDP's shards
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


class _BestBeside(TrainerCallback):
    """Lets the Trainer find its best checkpoint beside the one it resumes from; it stores a path of before."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replace the stored path."""
        if state.best_global_step is not None:
            state.best_model_checkpoint = str(_sibling(self.checkpoint, state.best_global_step))


def _is_last(checkpoint: Path) -> bool:
    """Whether the training was over when ``checkpoint`` was written."""
    state = _state_of(checkpoint)
    return state.global_step >= state.max_steps


def _require_whole(folder: Path, trainer: Trainer, method: Method) -> None:
    """Raise where the run cannot resume from ``folder``.

    Raises:
        DataError: A file is missing or damaged, or belongs to another run.
        PlanError: The plan is damaged.
    """
    _require_files(folder, [_STATE, *ADAPTER_FILES, PLAN_FILE])
    if AdapterPlan.load(folder / PLAN_FILE).ranks != method.plan.ranks:
        raise DataError(f"{folder} was trained on another plan than {trainer.args.output_dir}")
    state = _state_of(folder)
    read_json(folder / ADAPTER_FILES[0])
    _require_weights(folder, trainer)
    best = _best_of(folder, trainer)
    if best is not None:
        _require_weights(best, trainer)
    if any(isinstance(callback, MoverCallback) for callback in method.callbacks()):
        _require_files(folder, [STATE_FILE])
        with _read(folder / STATE_FILE):
            tensor_shapes(folder, STATE_FILE)
    if _sharded(trainer):
        if not [*folder.glob("optimizer*"), *folder.glob("global_step*")]:
            raise DataError(f"{folder} holds no state of the optimizer")
    elif state.global_step < state.max_steps:
        _require_training_state(folder, trainer)


def _require_training_state(folder: Path, trainer: Trainer) -> None:
    """Raise where the Trainer would begin optimizer, scheduler, scaler or random numbers anew, or stumble over them."""
    processes = trainer.args.world_size
    states = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    scaler = [_SCALER] if trainer.accelerator.scaler is not None else []
    _require_files(folder, [_OPTIMIZER, _SCHEDULER, *scaler, *states])
    optimizer = _torch_file(folder / _OPTIMIZER)
    with _read(folder / _OPTIMIZER):
        _require_optimizer(optimizer, trainer)
    for name in (_SCHEDULER, *scaler):
        values = _torch_file(folder / name)
        if not isinstance(values, dict) or (name == _SCHEDULER and "last_epoch" not in values):
            raise DataError(f"{folder / name} holds something else")
    for name in states:
        _require_random_state(folder / name)


def _require_optimizer(state: Any, trainer: Trainer) -> None:
    """Raise where the optimizer's state is that of other parameters."""
    groups, values = state["param_groups"], state["state"].values()
    if trainer.args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        return  # others may keep factors of another shape
    model: Any = trainer.model
    trained = Counter(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    moments = Counter(tuple(value["exp_avg"].shape) for value in values)
    count = sum(len(group["params"]) for group in groups)
    if count != trained.total() or moments - trained:
        raise DataError(f"it is of {count} other parameters than the {trained.total()} of this run")


def _require_random_state(path: Path) -> None:
    """Raise where the states are none: they are given to generators of our own."""
    with safe_globals():
        states = _torch_file(path)
    with _read(path):
        random.Random().setstate(states["python"])
        np.random.RandomState().set_state(states["numpy"])
        torch.Generator().set_state(states["cpu"])
        if torch.cuda.is_available() and "cuda" not in states:
            raise DataError("it holds no state of a CUDA device; resume on the kind of device that it was saved on")


def _require_weights(folder: Path, trainer: Trainer) -> None:
    """Raise where the adapter's weights have other names or shapes than the model's."""
    path = folder / ADAPTER_FILES[1]
    with _read(path):
        there = tensor_shapes(folder)
    if _sharded(trainer):
        return
    foreign = [name for name in _FOREIGN if (folder / name).exists()]
    foreign += [f"{path.parent.name}/" for path in folder.glob("*/adapter_model.*")]
    if foreign:
        raise DataError(f"{folder} holds {foreign[0]}, which no planned run writes; move it elsewhere")
    model: Any = trainer.model
    mine = {_plain(name): tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    theirs = {_plain(name): shape for name, shape in there.items()}
    if mine != theirs:
        name = min(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        raise DataError(
            f"{path} holds other weights than this run trains: {name} is {theirs.get(name, 'missing')} there, "
            f"{mine.get(name, 'missing')} here"
        )


def _state_of(folder: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Raises:
        DataError: It is damaged, or that of another step.
    """
    path = folder / _STATE
    with _read(path):
        state = TrainerState.load_from_json(str(path))
        numbers = state.global_step, state.max_steps
        history: list[Any] = state.log_history
        logged = all(isinstance(entry, dict) for entry in history)
        if not (all(type(number) is int for number in numbers) and logged):
            raise DataError("it holds no steps and losses")
    if step_of(folder) not in (None, state.global_step):
        raise DataError(f"{path} is the state of step {state.global_step}")
    return state


def _best_of(folder: Path, trainer: Trainer) -> Path | None:
    """The checkpoint that ``load_best_model_at_end`` will load, by its step: the stored path is of before a move."""
    step = _state_of(folder).best_global_step if trainer.args.load_best_model_at_end else None
    return None if step is None else _sibling(folder, step)


def _sibling(folder: Path, step: int) -> Path:
    return folder.with_name(f"checkpoint-{step}")


def _require_files(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} is no whole checkpoint of a planned run: it lacks {', '.join(missing)}")


def _torch_file(path: Path) -> Any:
    with _read(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _read(path: Path) -> Generator[None]:
    """Name the file in whatever goes wrong with its content: json, safetensors and torch raise many types."""
    try:
        yield
    except WeightLoraError as error:
        raise DataError(f"{path} is of another run: {error}") from error
    except Exception as error:  # its text would be about bytes, and torch's recommends to load pickles
        raise DataError(f"{path} is damaged or of another run ({type(error).__name__})") from error


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile's prefix


def _sharded(trainer: Trainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
