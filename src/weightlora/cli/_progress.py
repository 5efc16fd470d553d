"""Progress of training: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from rich.console import Console

#: Lines a method where the output is no terminal.
_LINES = 4


class Steps:
    """The progress of several trainings, one after another."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text)

    def method(self, name: str) -> TrainerCallback:
        """Return the callback that reports the training of ``name``."""
        return _Bar(self._console, name) if self._console.is_terminal else _Lines(self._console, name)


class _Bar(TrainerCallback):
    """A bar that lives as long as the training."""

    def __init__(self, console: Console, name: str) -> None:
        columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(name, total=None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._progress.update(self._task, total=state.max_steps)
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by a step."""
        self._progress.update(self._task, completed=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        self._progress.stop()


class _Lines(TrainerCallback):
    """A line every quarter of the training."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the line when its step has come."""
        if state.global_step % max(1, state.max_steps // _LINES) == 0:
            self._console.print(f"{self._name}: step {state.global_step} of {state.max_steps}")
