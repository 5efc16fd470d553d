"""How far a loop or a training is, where no bar can be shown: a line every half minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.model.distributed import is_first
from weightlora.text import duration

_LOG = logging.getLogger(__name__)
EVERY = 30.0
"""Seconds from line to line."""


class Progress:
    """A bar on a terminal, and elsewhere a line of the log now and then, as for a training.

    Args:
        bar: Whose ``total`` is the most steps there are.
        what: Name of the loop, or of its first phase.
        now: A clock, in seconds.
    """

    def __init__(self, bar: tqdm[Any], what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._bar, self._what, self._now = bar, what, now
        self._done, self._last = 0, now()

    def set_description(self, what: str) -> None:
        """Name the phase."""
        self._what = what
        self._bar.set_description(what)

    def update(self, steps: int = 1) -> None:
        """Go on by ``steps``, and say so where it is time."""
        self._bar.update(steps)
        self._done += steps
        now = self._now()
        if self._bar.disable and is_first() and now - self._last >= EVERY:
            self._last = now
            _LOG.info("%s: %d of %s", self._what, self._done, self._bar.total)


class ProgressLines(TrainerCallback):
    """Says now and then which step a training has reached, its last logged loss, and how long it will take.

    Of a measurement it says which batch it has reached.

    Args:
        say: Prints a line.
        now: A clock, in seconds.
    """

    every = EVERY
    """Seconds from line to line."""

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._say, self._now = say, now
        self._loss: float | None = None
        self._last, self._measured = now(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock; a resumed training does not begin at step 0."""
        self._begin = self._last = self._now()
        self._first = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Keep the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say the line where it is time."""
        if not self._is_time(state):
            return
        left = (self._last - self._begin) / (state.global_step - self._first) * (state.max_steps - state.global_step)
        loss = "" if self._loss is None else f", loss {self._loss:.4g}"
        self._say(f"step {state.global_step} of {state.max_steps}{loss}, {duration(left)} left")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Say which batch is measured where it is time."""
        self._measured += 1
        if self._is_time(state):
            self._say(f"measuring: batch {self._measured} of {len(eval_dataloader)}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next measurement begins at its first batch."""
        self._measured = 0

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **_: Any
    ) -> None:
        """The same of one by ``predict``."""
        self._measured = 0

    def _is_time(self, state: TrainerState) -> bool:
        now = self._now()
        if now - self._last < self.every or not state.is_world_process_zero:
            return False
        self._last = now
        return True
