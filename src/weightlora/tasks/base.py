"""What a task is: where its rows come from, what its columns mean, how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

#: The split of training rows that options are chosen on.
HELD_OUT = "held_out"

Kind = Literal["classification", "question_answering", "summarisation", "completion"]


@dataclass(frozen=True)
class Task:
    """A data set and what is asked of it; a line of :data:`weightlora.tasks.TASKS`."""

    name: str
    kind: Kind
    """The file of ``weightlora.tasks`` that prepares, trains and measures it."""
    columns: Mapping[str, str]
    """Role → column: ``{"text": "premise", "pair": "hypothesis", "label": "label"}``."""
    metrics: tuple[str, ...]
    """The first one is what options are chosen by."""
    dataset: str | None = None
    """Hub name; None where the rows are the user's own."""
    subset: str | None = None
    eval_splits: tuple[str, ...] = ("validation",)
    labels: tuple[str, ...] | None = None
    """Names in the order of their numbers; () is a regression, None is read from the rows."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What only this task needs, such as the harness's name of it."""
    lower_is_better: bool = False
    """Whether smaller values of the metrics are better, as of a loss."""


@dataclass(frozen=True)
class Place:
    """Where the rows of a split are from, for errors: a file or a split, and the line of each row, if it has lines.

    Example:
        >>> Place("a.csv", (2, 3)).row(1), Place("the split 'train'").row(1)
        ('line 3 of a.csv', "row 2 of the split 'train'")
    """

    name: str
    lines: Sequence[int] | None = None

    def row(self, number: int) -> str:
        """Name the row of a position that counts from 0; in the text rows count from 1, as lines do."""
        at = f"row {number + 1}" if self.lines is None else f"line {self.lines[number]}"
        return f"{at} of {self.name}"


@dataclass(frozen=True)
class RowOptions:
    """How rows become tokens; what each kind of task needs of it."""

    max_length: int = 128
    """Tokens of a row, or of a source text."""
    max_target_length: int = 128
    """Tokens of a summary or of a generated answer."""
    doc_stride: int = 128
    """Tokens that neighbouring pieces of a long context share."""
    num_beams: int = 1
    """Beams of a generated summary."""
    teacher_forced: bool = False
    """Measure the given answers in one forward pass instead of generating answers."""


@dataclass(frozen=True)
class PreparedTask:
    """A task with its rows tokenised: what a run needs of it."""

    make_trainer: Callable[[Any, TrainingArguments, Sequence[TrainerCallback]], Trainer]
    """``make_trainer(model, arguments, callbacks)``: a real transformers or TRL trainer."""
    measure: Callable[[Trainer], dict[str, float]]
    """``measure(trainer)``: every metric of every evaluation split, named ``split_metric``."""


class TaskKind(Protocol):
    """How tasks of one kind are loaded, prepared and measured; each is a file of ``weightlora.tasks``."""

    @property
    def TASK_TYPE(self) -> str:
        """PEFT's name for it, such as ``"SEQ_CLS"``."""
        ...

    def arguments_class(self) -> type[TrainingArguments]:
        """Return the class of the training arguments.

        Raises:
            MissingPackageError: A package that only this kind needs is not installed.
        """
        ...

    def check_rows(self, task: Task, rows: Dataset, place: Place) -> None:
        """Raise where a row is not as the task needs it; before a model is loaded.

        Args:
            task: The task.
            rows: A split of its rows, in the order of the file.
            place: Where they are from, for the error.

        Raises:
            DataError: With the value found, the file and the row.
        """
        ...

    def prepare(
        self, task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions
    ) -> PreparedTask:
        """Return the task with its rows tokenised, ready for a trainer.

        Args:
            task: The task.
            rows: ``"train"``, and the splits to measure; without any, ``measure`` returns nothing.
            tokenizer: The model's.
            options: Lengths in tokens.

        Raises:
            DataError: A row is not as the task needs it.
            MissingPackageError: The task's metric needs a package that is not installed.
        """
        ...
