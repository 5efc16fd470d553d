"""The rows of a task: from the hub, from a saved ``datasets`` folder, or from the user's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError, require_extra
from weightlora.tasks import kind_of
from weightlora.tasks._read_file import check_columns, read_file
from weightlora.tasks._values import check_labels, number_labels
from weightlora.tasks.base import HELD_OUT, Place, Task
from weightlora.validation import read_pairs

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True)
class Source:
    """Where the rows come from; by default the task's own data set."""

    dataset_name: str | None = None
    """Hub name, or a folder that ``datasets`` can load."""
    dataset_config_name: str | None = None
    """The data set's configuration; for a generator its settings: ``"min_terms=2 max_terms=3"``."""
    train_file: str | None = None
    validation_file: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    held_out_samples: int = 0
    """Training rows set aside as the split :data:`HELD_OUT`; ``max_train_samples`` does not count them."""


def with_columns(task: Task, columns: Sequence[str]) -> Task:
    """Return the task with other columns for some of its roles.

    Args:
        task: The task.
        columns: ``"role=column"`` each.

    Raises:
        OptionError: A word has no ``=``, or the task has no such role.

    Example:
        >>> task = Task("mine", "classification", {"text": "text", "label": "label"}, ("accuracy",))
        >>> dict(with_columns(task, ["text=review"]).columns)
        {'text': 'review', 'label': 'label'}
    """
    changed = dict(task.columns)
    for word in columns:
        role, equals, column = word.partition("=")
        if not equals or not column:
            raise OptionError(f"columns: {word!r} is no role=column; the roles of {task.name} are {', '.join(changed)}")
        if role not in changed:
            raise OptionError(f"columns: {task.name} has no role {role!r}; there are {', '.join(changed)}")
        changed[role] = column
    return replace(task, columns=changed)


def load_rows(task: Task, source: Source, *, seed: int = 0, measured: bool = True) -> DatasetDict:
    """Return the splits ``"train"`` and ``task.eval_splits``, each checked for the task's columns and values.

    With the user's own files there is one evaluation split, ``"validation"``. Training rows that are held out are one
    more: :data:`HELD_OUT`. Labels that the task or the data set does not number are numbered here, those of all splits.

    Args:
        task: The task.
        source: Where the rows come from.
        seed: Decides the rows that are generated or drawn here: puzzles and the embedded sentences.
        measured: False returns the training rows only, and needs no others; their labels are numbered where they are
            there, so that the head is the same.

    Raises:
        DataError: A file, split or column is missing, a split is empty, or a row is not as the task needs it.
        MissingPackageError: The package ``datasets`` is not installed.
        OptionError: The task has no data of its own and none was given, or more rows are held out than there are.

    Warns:
        WeightLoraWarning: A label has no training row, or a cell looks like a missing value.
    """
    require_extra("datasets", "train")
    from datasets import DatasetDict

    if source.max_train_samples is not None:
        source = replace(source, max_train_samples=source.max_train_samples + source.held_out_samples)
    found = _files(task, source, measured) if source.train_file else _dataset(task, source, seed)
    evaluated = ("validation",) if source.train_file else task.eval_splits
    numbers_labels = task.kind == "classification" and task.labels is None
    wanted = {"train": source.max_train_samples}
    wanted |= {name: source.max_eval_samples for name in evaluated if measured or (numbers_labels and name in found)}
    rows: dict[str, Dataset] = {}
    places: dict[str, Place] = {}
    for name, most in wanted.items():
        rows[name], places[name] = _split(task, found, name, most)
        kind_of(task).check_rows(task, rows[name], places[name])
    if numbers_labels:
        rows = number_labels(task, rows, places)
    if not measured:
        rows = {"train": rows["train"]}
    if source.held_out_samples:
        rows["train"], rows[HELD_OUT] = _hold_out(rows["train"], source.held_out_samples, seed)
    if task.kind == "classification":
        check_labels(task, rows)
    checked: Any = DatasetDict()
    checked.update(rows)
    return checked


def _split(task: Task, found: Mapping[str, Any], name: str, most: int | None) -> tuple[Dataset, Place]:
    """The first rows of a split, and where they are from."""
    if name not in found:
        raise DataError(f"{task.name} needs a split {name!r}; there are {', '.join(found) or 'none'}")
    rows, place = found[name] if isinstance(found[name], tuple) else (found[name], Place(f"the split {name!r}"))
    if len(rows) == 0:
        raise DataError(f"{place.name} has no rows")
    check_columns(task, place, rows.column_names)
    return rows if most is None else rows.select(range(min(most, len(rows)))), place


def _hold_out(rows: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    if not 0 < count < len(rows):
        raise OptionError(
            f"held_out_samples={count} is not allowed: give 0 to {len(rows) - 1}, so that rows to train on are left"
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _files(task: Task, source: Source, measured: bool) -> Mapping[str, tuple[Dataset, Place]]:
    missing = [file for file in (source.train_file, source.validation_file) if file and not Path(file).is_file()]
    if missing:
        raise DataError(f"there is no file {' and no file '.join(missing)}")
    if measured and source.validation_file is None:
        raise OptionError("train_file needs a validation_file: rows to measure on that are not trained on")
    files = {
        "train": (source.train_file, source.max_train_samples),
        "validation": (source.validation_file, source.max_eval_samples),
    }
    return {name: read_file(Path(file), task, most) for name, (file, most) in files.items() if file is not None}


def _dataset(task: Task, source: Source, seed: int) -> Any:
    from datasets import load_dataset, load_from_disk

    name = source.dataset_name or task.dataset
    if name is None:
        raise OptionError(f"{task.name} has no data of its own: give dataset_name, or train_file and validation_file")
    if name.startswith("reasoning_gym/"):
        from weightlora.tasks._prompts import passages, reasoning_rows

        draw = passages if task.kind == "question_answering" else reasoning_rows
        train, validation = source.max_train_samples or 1000, source.max_eval_samples or 200
        settings = _generator_settings(source.dataset_config_name)
        return draw(name.partition("/")[2], train, validation, seed, **settings)
    if name in ("embedded/rotten_tomatoes", "embedded/roget"):
        return _embedded(name, source, seed)
    if (Path(name) / "dataset_dict.json").is_file():  # what DatasetDict.save_to_disk wrote
        return _load(name, load_from_disk, name)
    subset = source.dataset_config_name or (task.subset if source.dataset_name is None else None)
    return _load(" ".join(filter(None, (name, subset))), load_dataset, name, subset)


def _generator_settings(text: str | None) -> dict[str, Any]:
    """Return ``"min_terms=2 max_terms=3"`` as a dict."""
    return read_pairs("dataset_config_name", (text or "").split(), such_as="max_terms=3")


def _embedded(name: str, source: Source, seed: int) -> Any:
    from datasets import Dataset, DatasetDict

    from weightlora.tasks.embedded import roget, rotten_tomatoes

    draw = roget if name == "embedded/roget" else rotten_tomatoes
    data = draw(source.max_train_samples or 2000, test=source.max_eval_samples or 1000, seed=seed)
    splits = {"train": data.train, "validation": data.test}
    rows = {name: [{"text": text, "label": label} for text, label in split] for name, split in splits.items()}
    return DatasetDict({name: Dataset.from_list(split) for name, split in rows.items()})


def _load(what: str, load: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except Exception as error:  # the readers raise whatever pandas, pyarrow or the hub's client raise
        reason = next(iter(str(error).splitlines()), "it has no rows")  # an empty file ends in a bare StopIteration
        raise DataError(f"cannot load {what}: {reason}") from error
