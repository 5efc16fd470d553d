"""What is frozen below the lowest adapter is computed once: hidden states are stored, and read back in every epoch.

store = weightlora.store_frozen(trainer)       # after select_for, before trainer.train()
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.distributed import is_first
from weightlora.model.frozen_prefix import FrozenPrefix, find_blocks, hidden_of
from weightlora.model.hidden_store import HiddenFile, HiddenStore
from weightlora.model.restore import evaluated, seeded
from weightlora.plan.limits import Limits
from weightlora.plan.plan import AdapterPlan
from weightlora.trainer._question import weights_fingerprint
from weightlora.trainer.loader import (
    is_parted,
    micro_batches,
    micro_loss,
    placed,
    planned_epochs,
    quiet_copy,
    require_readable_twice,
    require_usable_batches,
    within_memory,
)

_LOG = logging.getLogger(__name__)
#: Two passes whose hidden states differ by more than this share of their size draw random numbers.
_SAME = 1e-3
#: The loss with the store may differ from the model's own by this share, and where it is computed in 16 bits by that.
_EXACT, _ROUNDED = 1e-3, 3e-2
#: Batches from which the size of the store is estimated.
_FEW = 4
#: Where a smaller share of a later epoch is in the store, its rows change from epoch to epoch.
_FEWEST_HITS = 0.5


class FrozenStore:
    """The stored hidden states of a trainer's model, until its training ends.

    Args:
        prefix: The blocks below the floor.
        expected: Estimated bytes of all rows; None where their number is not known.
    """

    def __init__(self, prefix: FrozenPrefix, expected: int | None) -> None:
        self._prefix, self.expected = prefix, expected
        self._left: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """How many rows are stored, or were when the training ended."""
        return len(self._prefix.store) if self._left is None else self._left[0]

    @property
    def bytes(self) -> int:
        """What they take, or took, in bytes."""
        return self._prefix.store.bytes if self._left is None else self._left[1]

    @property
    def is_full(self) -> bool:
        """Whether a row did not fit."""
        return self._prefix.store.is_full

    @property
    def hits(self) -> int:
        """Rows that were read back instead of computed."""
        return self._prefix.hits

    @property
    def misses(self) -> int:
        """Rows that were computed."""
        return self._prefix.misses

    def note_epoch(self) -> None:
        """Note that an epoch is over, after which all rows are stored unless they do not fit."""
        self._prefix.is_filled = not self.is_full

    @property
    def floor(self) -> str:
        """The blocks that are not run for a stored row, in words."""
        return self._prefix.floor.text

    def remove(self) -> None:
        """Give the model back as it was, and the memory or the files."""
        if self._left is None:
            self._left = self.rows, self.bytes
            self._prefix.remove()
            self._prefix.store.close()


def store_frozen(
    trainer: Trainer,
    *,
    folder: str | Path | None = None,
    limit: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    dropout: Literal["off below"] | None = None,
    offload: bool = False,
) -> FrozenStore:
    """Store what enters the lowest block with an adapter, row by row; blocks below are not run again for these rows.

    Rows are known by their content, so that shuffling, other batches and padding change nothing. The first epoch fills
    the store; of a training of one epoch, which reads nothing back, nothing is kept in memory. Evaluation, generation
    and checkpoints are those of the whole model. Before anything is stored, the first batch is computed with and
    without the store: a model that is not the same with it is refused.

    GreenTrainer (arXiv:2309.13192) chooses tensors by their backward cost; AutoFreeze (2102.01386) and Egeria
    (2201.06227) store the output of frozen layers in training loops of their own.

    Args:
        trainer: A trainer on a PEFT model, planned or not, that has not trained yet.
        folder: For the hidden states, which a later training of the same model then reads; None keeps them in memory.
        limit: The most that they may take, such as ``"20GB"``; rows beyond it are computed in every epoch.
        dtype: What they are stored as; None takes the model's own type.
        dropout: A model with dropout below the floor has no fixed hidden states. ``"off below"`` runs these blocks as
            in evaluation, which is another training.
        offload: After the first epoch the weights of these blocks leave the device for the CPU's memory. They come back
            for evaluation and generation, for a row that is not stored, and when the training ends.

    Raises:
        OptionError: The lowest block is trained, something below it is, or draws random numbers; the model's loss is
            not the same with the store; or FSDP, DeepSpeed, ``torch_compile`` or NEFTune are used.
        DataError: The folder has states of another model.
        OutputError: The folder cannot be written.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["layers.2.self_attn.q_proj"]))
        >>> rows = [{"input_ids": [1, 2, i], "labels": [1, 2, i]} for i in range(8)]
        >>> quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        >>> trainer = Trainer(model, TrainingArguments(str(tmp_path), num_train_epochs=3, **quiet), train_dataset=rows)
        >>> store = store_frozen(trainer)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {...
        >>> store.floor, store.rows, store.hits
        ('2 of 3 blocks of model.layers', 8, 16)
    """
    _require_possible(trainer)
    model: Any = trainer.model
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in (None, *kinds):
        raise OptionError(f"dtype={dtype!r} is not allowed: give {', '.join(kinds)} or None")
    if dropout not in (None, "off below"):
        raise OptionError(f"dropout={dropout!r} is not allowed: give 'off below', or None")
    most = None if limit is None else Limits(memory=limit).bytes
    prefix = FrozenPrefix(model, HiddenStore(torch.float32), dropout_off=dropout is not None)
    if folder is None and isinstance(trainer.train_dataset, Sized) and planned_epochs(trainer) <= 1:
        store = FrozenStore(prefix, expected=0)
        store.remove()
        _tell(trainer.args, "nothing is stored: a training of one epoch reads nothing back")
        return store
    try:
        with placed(trainer), seeded(trainer.args.seed), within_memory(trainer):
            first = [*islice(micro_batches(quiet_copy(trainer)), _FEW)]
            if not first:
                raise OptionError("the trainer's loader yields no batch, so there is nothing to store")
            hidden = _check(trainer, prefix, first[0])
        kind = hidden.dtype if dtype is None else kinds[dtype]
        expected = _expected(trainer, first, hidden.shape[-1] * kind.itemsize)
        if folder is None:
            prefix.store = HiddenStore(kind, most)
        else:
            config: Any = model.peft_config[model.active_adapters[0]] if isinstance(model, PeftModel) else LoraConfig()
            header = {"floor": prefix.floor.text, "weights": weights_fingerprint(model, config), "dropout": dropout}
            own = Path(folder) / f"process-{trainer.args.process_index}"
            prefix.store = HiddenFile(own, header, kind, most)
        if offload:
            prefix.offload_below()
    except BaseException:
        prefix.remove()
        raise
    store = FrozenStore(prefix, expected)
    trainer.add_callback(StoreCallback(store))
    size = "an unknown size" if expected is None else f"about {expected / 1e9:.3g} GB"
    away = f", and {prefix.offload.bytes / 1e9:.3g} GB of weights leave the device" if prefix.offload else ""
    text = f"{prefix.floor.text} are stored in the first epoch, {size}; later epochs do not run them{away}"
    _tell(trainer.args, text)
    return store


def store_planned(trainer: Trainer, plan: AdapterPlan, **options: Any) -> FrozenStore | None:
    """Return :func:`store_frozen`'s store, or None where the plan for a run with a store is fewer steps of all layers.

    Args:
        trainer: On the plan's model.
        plan: What the trainer trains.
        options: As of :func:`store_frozen`.

    Raises:
        OptionError: As :func:`store_frozen`.
        DataError: As :func:`store_frozen`.
        OutputError: As :func:`store_frozen`.
    """
    model: Any = trainer.model
    fewer_steps = plan.step_share < 1 and "epochs" in plan.options
    if fewer_steps and any(p.requires_grad for p in find_blocks(model)[1][0].parameters()):
        _tell(trainer.args, "nothing is stored: fewer steps of all layers are expected to do better than a floor")
        return None
    return store_frozen(trainer, **options)


def _tell(arguments: TrainingArguments, text: str) -> None:
    """Log a line in the first process; where the log is not shown, as in most scripts, write it beside the bar."""
    if not is_first():
        return
    if _LOG.isEnabledFor(logging.INFO):
        _LOG.info(text)
    elif not arguments.disable_tqdm:
        tqdm.write(text)


def _require_possible(trainer: Trainer) -> None:
    require_usable_batches(trainer)
    require_readable_twice(trainer)
    reasons = {
        "FSDP and DeepSpeed part the model": is_parted(trainer),
        "torch_compile would run what is skipped": trainer.args.torch_compile,
        "neftune_noise_alpha changes the embeddings in every step": trainer.neftune_noise_alpha is not None,
        "the trainer makes its model in train()": trainer.model_init is not None,
        "the trainer has trained already": trainer.state.global_step > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise OptionError(f"store_frozen: {reason}; leave that out, or train without a store")


def _check(trainer: Trainer, prefix: FrozenPrefix, batch: Any) -> Tensor:
    """Return the hidden states of a batch, after the model was found to be the same with and without the store.

    Raises:
        OptionError: It is not.
    """
    model: Any = trainer.model
    loss_of = micro_loss(quiet_copy(trainer))
    with torch.no_grad(), _modes(model):
        model.train()  # as in training, and as `evaluated` asks of 4-bit layers
        with evaluated(model):
            whole = loss_of(model, batch)
        inputs = prefix.inputs
        trained = prefix.find_below(inputs)
        if trained:
            raise OptionError(
                f"{trained[0]} is trained and runs before {prefix.floor.text} are done, so that what they make "
                "changes; train it no further, or train without a store"
            )
        first, again = (hidden_of(prefix.compute(inputs)) for _ in range(2))
        if float((first - again).abs().max()) > _SAME * float(first.abs().max()):
            raise OptionError(
                f"{prefix.floor.text} draw random numbers, such as dropout's, and have other hidden states in each "
                "epoch; give dropout='off below', which runs them as in evaluation, or train without a store"
            )
        prefix.store, prefix.always = HiddenStore(first.dtype), True
        with evaluated(model):
            stored = [loss_of(model, batch) for _ in range(2)]
        prefix.always, prefix.hits, prefix.misses = False, 0, 0
    exact = _EXACT if first.dtype in (torch.float32, torch.float64) and not _is_rounded(trainer) else _ROUNDED
    for loss in stored:
        if not bool((loss - whole).abs() <= exact * whole.abs() + 1e-6):
            raise OptionError(
                f"the loss of the first batch is {float(loss):.6g} with a store and {float(whole):.6g} without, so "
                "that this model reads more than the hidden states below its adapters; train it without a store"
            )
    return first


def _is_rounded(trainer: Trainer) -> bool:
    return bool(trainer.args.bf16 or trainer.args.fp16)


@contextmanager
def _modes(model: nn.Module) -> Generator[None]:
    """Give each module its mode back when the block ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _expected(trainer: Trainer, batches: list[Any], token: int) -> int | None:
    """Bytes of all rows, by the tokens of the first batches; None where the number of rows is not known."""
    rows: Any = trainer.train_dataset
    if not isinstance(rows, Sized):
        return None
    masks: list[Tensor] = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    if not masks:
        tensors = [value for batch in batches for value in batch.values() if isinstance(value, Tensor)]
        masks = [torch.ones_like(value) for value in tensors if value.dim() == 2]
    if not masks:
        return None
    tokens = sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks)
    return round(len(rows) * tokens * token)


class StoreCallback(TrainerCallback):
    """Tells what is stored, gives up where rows change, and ends with the training."""

    def __init__(self, store: FrozenStore) -> None:
        self._store, self._hits, self._misses, self._before = store, 0, 0, 0

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say once what is stored; warn where a later epoch has other rows."""
        hits, misses = self._store.hits - self._hits, self._store.misses - self._misses
        self._hits, self._misses, rows = self._store.hits, self._store.misses, hits + misses
        before, self._before = self._before, rows
        self._store.note_epoch()
        if not before:
            _tell(args, f"{self._store.rows} rows are stored, {self._store.bytes / 1e9:.3g} GB")
        # After an epoch that was whole: a resumed training begins within one.
        if before >= rows and hits < _FEWEST_HITS * rows and not self._store.is_full:
            warnings.warn(
                f"{misses} of {rows} rows of an epoch were not in the store, as they change from epoch to epoch; the "
                "training goes on without a store",
                WeightLoraWarning,
                stacklevel=2,
            )
            self._store.remove()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model back as it was."""
        self._store.remove()
