"""What a trainer is going to train on, looked at before it does: its own batches and loss, and where its weights are.

DDP copies, FSDP and DeepSpeed part the model when the training starts, so that scoring before it finds it whole;
two settings part it as it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from io import IOBase
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from weightlora.errors import OptionError, SelectionError, WeightLoraError
from weightlora.model.distributed import has_shards

#: Methods of ``Trainer`` that a trainer overrides where it trains on something else than its loader's batches.
_OWN_INPUTS = frozenset(["_prepare_inputs", "_inner_training_loop"])
#: TRL's trainers that do so in ``training_step``, which others override as well.
_GENERATE = frozenset(["OnlineDPOTrainer", "GKDTrainer"])
#: What a failing ``compute_loss`` raises where it was given inputs of another kind.
_WRONG_INPUTS = (TypeError, KeyError, AttributeError, ValueError)
_ROAD = (
    "plan = weightlora.select(base_model, batches, lora=..., loss_fn=...) on examples of your own, then give the "
    "trainer the base model and peft_config=plan.to_lora_config()"
)


def require_usable_batches(trainer: Trainer) -> None:
    """Raise where the loader's batches are not what the trainer computes its loss on; the trainer is left as it is.

    Raises:
        OptionError: With the two steps that do without them.
    """
    kind = type(trainer)
    own = kind.__mro__[: kind.__mro__.index(Trainer)]
    names = {base.__name__ for base in own}
    if any(base.__module__.partition(".")[0] == "sentence_transformers" for base in own):
        raise OptionError(
            f"{kind.__name__} saves and loads adapters by names inside the model's transformer, which those of a "
            "PeftModel around it are not; select on the transformer: plan = weightlora.select(model[0].auto_model, "
            "batches, lora=..., loss_fn=lambda _, batch: trainer.compute_loss(model, dict(batch))), then "
            "model.add_adapter(plan.to_lora_config()) before the trainer is made"
        )
    if names & _GENERATE or any(_OWN_INPUTS & vars(base).keys() for base in own):
        raise OptionError(f"{kind.__name__} makes its batches while it trains, so none can be scored before; {_ROAD}")


def require_readable_twice(trainer: Trainer) -> None:
    """Raise where the training's rows can be read only once: scoring would take them from the training.

    Raises:
        OptionError: With what to give instead.
    """
    rows: Any = trainer.train_dataset
    if not isinstance(rows, IterableDataset):
        return
    # Making an iterator reads nothing, unless __iter__ itself does.
    if iter(rows) is iter(rows) or any(map(_runs_out, vars(rows).values())):
        raise OptionError(
            f"the train_dataset ({type(rows).__name__}) can be read only once, and scoring would take its first rows "
            "from the training; make a new iterator in each __iter__, or select() on batches of your own"
        )


def _runs_out(value: object) -> bool:
    """Whether a second loop over the value begins where the first one ended; a file can be rewound."""
    return isinstance(value, Iterator) and not isinstance(value, IOBase)


@contextmanager
def within_memory(trainer: Trainer) -> Generator[None]:
    """Say which batch did not fit where scoring runs out of memory; nothing tries a smaller one there.

    Raises:
        SelectionError: It did not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        found = " (auto_find_batch_size only acts in train())" if trainer.args.auto_find_batch_size else ""
        raise SelectionError(
            f"{trainer.args.train_batch_size} rows at once did not fit into memory while sites were scored{found}; "
            "lower per_device_train_batch_size and raise gradient_accumulation_steps, or set gradient_checkpointing"
        ) from error


def planned_steps(trainer: Trainer) -> int:
    """Return how many optimizer steps ``trainer.train()`` is going to take."""
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(max_steps)


def planned_epochs(trainer: Trainer) -> float:
    """Return how often ``trainer.train()`` is going to see each row."""
    _, each, *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return max_steps / each


def quiet_copy(trainer: Trainer) -> Trainer:
    """Return a copy of the trainer with notebooks of its own: what a loss writes down stays out of the logs."""
    quiet = copy(trainer)
    notes = {
        key: value for key, value in vars(trainer).items() if isinstance(value, dict) and key != "callback_handler"
    }
    vars(quiet).update(deepcopy(notes))
    return quiet


def optimizer_steps(trainer: Trainer) -> Iterator[tuple[list[Any], Any]]:
    """Yield the training's own batches, grouped by optimizer step, each with its count of items for the mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory'")  # train() says it once more where there is no accelerator
        batches = iter(trainer.get_train_dataloader())
    while True:
        group, items = trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, trainer.args.device)
        if not group:
            return
        yield group, items


def losses(trainer: Trainer) -> Callable[[nn.Module, tuple[list[Any], Any]], Iterator[Tensor]]:
    """Return the trainer's loss of each micro-batch, scaled so that their gradients add up to that of the step."""

    def of_step(model: nn.Module, step: tuple[list[Any], Any]) -> Iterator[Tensor]:
        group, items = step
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        for inputs in group:
            loss = _loss(trainer, model, inputs, num_items_in_batch=items)
            yield loss if scaled else loss / len(group)

    return of_step


def micro_batches(trainer: Trainer) -> Iterator[Any]:
    """Yield the training's own batches one by one, for methods that look at rows and not at optimizer steps."""
    for group, _ in optimizer_steps(trainer):
        yield from group


def micro_loss(trainer: Trainer, *, together: bool = False) -> Callable[[nn.Module, Any], Tensor]:
    """Return the trainer's loss of one batch.

    Args:
        trainer: Whose loss.
        together: All processes compute it at the same time, each on its own batch; the mean of their losses is then
            that of one process on all of their tokens.
    """

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        if not together:
            return _loss(trainer, model, inputs)
        _, items = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
        return _loss(trainer, model, inputs, num_items_in_batch=items)

    return loss


def _loss(trainer: Trainer, model: nn.Module, inputs: Any, **given: Any) -> Any:
    """The trainer's loss of one batch.

    Raises:
        OptionError: The loss cannot be computed on what the trainer's loader yields.
    """
    try:
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast(), _noise(trainer, model):
            # A copy: losses may write to their inputs, and a batch can be used twice.
            return trainer.compute_loss(model, dict(inputs), **given)
    except WeightLoraError:
        raise
    except _WRONG_INPUTS as error:
        what = str(error).split("\n", 1)[0]
        raise OptionError(
            f"{type(trainer).__name__}.compute_loss fails on a batch of its own loader ({type(error).__name__}: {what})"
            f"; if the trainer changes its batches while it trains, {_ROAD}"
        ) from error


@contextmanager
def _noise(trainer: Trainer, model: nn.Module) -> Generator[None]:
    """Add the noise of NEFTune to the embeddings for the length of the block, as train() does for its own."""
    alpha = trainer.neftune_noise_alpha
    if alpha is None:
        yield
        return
    handle = activate_neftune(model, alpha, trainer.accelerator)
    try:
        yield
    finally:
        deactivate_neftune(model, handle, trainer.accelerator)


# -- where the weights are ---------------------------------------------------------------------------------------------


def is_parted(trainer: Trainer) -> bool:
    """Whether a process has only parts of the trained matrices or of their gradients."""
    model: Any = trainer.model
    parallel = trainer.args.parallelism_config is not None or has_shards(model)
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or parallel)


def require_weights(trainer: Trainer) -> None:
    """Raise where a process does not have the weights, which a forward pass before the training needs.

    Raises:
        OptionError: With the two steps that do without it.
    """
    if _loads_on_first(trainer):
        raise OptionError(
            "FSDP's cpu_ram_efficient_loading leaves the weights on the first process, but the scoring needs them: run "
            "`weightlora select` in one process first, then `weightlora train --plan plan.json` with all of them "
            "(docs/guides/distributed.md)"
        )


def require_heads(trainer: Trainer) -> None:
    """Raise where a module that is trained whole has no weights on some processes.

    Accelerate finds the optimizer's tensors again by their addresses, and those without weights all have the same.

    Raises:
        OptionError: With the module and the setting.
    """
    model: Any = trainer.model
    whole = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if whole and _loads_on_first(trainer):
        raise OptionError(
            f"FSDP's cpu_ram_efficient_loading leaves {whole[0]} without weights on all processes but the first, where "
            "it would not be trained; set it to false"
        )


def require_measurable(trainer: Trainer) -> None:
    """Raise where the model cannot be measured before it trains.

    Raises:
        OptionError: With the setting.
    """
    if trainer.is_fsdp_enabled:
        raise OptionError(
            "eval_on_start: FSDP takes a model together with its optimizer, so there is nothing to measure before the "
            "training; leave eval_on_start out"
        )


@contextmanager
def placed(trainer: Trainer) -> Generator[None]:
    """Have the model on the device for the length of the block: with FSDP, only the training takes it there."""
    model: Any = trainer.model
    home = next(model.parameters()).device
    if trainer.is_fsdp_enabled:
        model.to(trainer.args.device)
    try:
        yield
    finally:
        if trainer.is_fsdp_enabled:
            model.to(home)


def _loads_on_first(trainer: Trainer) -> bool:
    plugin: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)
