"""A training that stops after a few timed steps."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.cost.saved_bytes import now


class FewSteps(TrainerCallback):
    """Stops a training after twelve steps, or after four where they are slow, and knows how long one takes.

    The first two count as part of the start: memory is allocated and kernels are chosen then. A step that takes more
    than three times the median, such as one with a round of ALoRA's, is not multiplied.
    """

    _STEPS, _UNTIMED, _FEWEST, _SLOW, _UNUSUAL = 12, 2, 4, 30.0, 3

    def __init__(self) -> None:
        self.planned = 0
        """Steps of the whole training."""
        self._begin = 0.0
        self._ends: list[float] = []

    @property
    def taken(self) -> int:
        """Steps that were taken."""
        return len(self._ends)

    @property
    def step_seconds(self) -> float:
        """Mean time of a step with its batch, without the steps in which a method does what it seldom does."""
        lengths = [end - begin for begin, end in pairwise([self._begin, *self._ends])]
        lengths = lengths[self._UNTIMED :] or lengths
        most = self._UNUSUAL * statistics.median(lengths)
        return statistics.mean(length for length in lengths if length <= most)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.planned, self._begin, self._ends = state.max_steps, now(), []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time, and stop when there are enough."""
        self._ends.append(now())
        slow = self.taken >= self._FEWEST and self._ends[-1] - self._begin > self._SLOW
        if slow or self.taken >= self._STEPS:
            control.should_training_stop = True
