"""Every task that can be trained by its name: the paper's, the embedded ones, and the user's own rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.model.sites import LOADERS
from weightlora.tasks import classification, completion, question_answering, summarisation
from weightlora.tasks.base import Kind, Task, TaskKind
from weightlora.tasks.pretrained import load_pretrained
from weightlora.text import closest

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import DatasetDict
    from transformers import PreTrainedModel

_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")


def _glue(name: str, text: str, pair: str | None, labels: tuple[str, ...], *metrics: str, **fields: Any) -> Task:
    columns = {"text": text, **({"pair": pair} if pair else {}), "label": "label"}
    return Task(name, "classification", columns, metrics, "nyu-mll/glue", name, labels=labels, **fields)


def _own(name: str, kind: Kind, metrics: tuple[str, ...], *roles: str, **fields: Any) -> Task:
    return Task(name, kind, {role: role for role in roles}, metrics, **fields)


_SQUAD = {"question": "question", "context": "context", "answers": "answers", "id": "id"}
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

#: Kept as one readable list. The metrics are the official ones of each benchmark.
TASKS = (
    _glue("cola", "sentence", None, ("unacceptable", "acceptable"), "matthews_correlation"),
    _glue("sst2", "sentence", None, ("negative", "positive"), "accuracy"),
    _glue("mrpc", "sentence1", "sentence2", ("not_equivalent", "equivalent"), "accuracy", "f1"),
    _glue("stsb", "sentence1", "sentence2", (), "pearson", "spearman"),
    _glue("qqp", "question1", "question2", ("not_duplicate", "duplicate"), "accuracy", "f1"),
    _glue(
        *("mnli", "premise", "hypothesis", _MNLI, "accuracy"),
        eval_splits=("validation_matched", "validation_mismatched"),
    ),
    _glue("qnli", "question", "sentence", _ENTAILMENT, "accuracy"),
    _glue("rte", "sentence1", "sentence2", _ENTAILMENT, "accuracy"),
    Task("squad", "question_answering", _SQUAD, ("exact_match", "f1"), "rajpurkar/squad"),
    Task(
        *("squad_v2", "question_answering", _SQUAD, ("exact_match", "f1"), "rajpurkar/squad_v2"),
        options={"unanswerable": True},
    ),
    Task(  # generated, as the rows of "reasoning" are
        *("needle_haystack", "question_answering", _SQUAD, ("exact_match", "f1"), "reasoning_gym/needle_haystack"),
    ),
    Task("xsum", "summarisation", {"document": "document", "summary": "summary"}, _ROUGE, "EdinburghNLP/xsum"),
    Task(
        *("cnn_dailymail", "summarisation", {"document": "article", "summary": "highlights"}, _ROUGE),
        *("abisee/cnn_dailymail", "3.0.0"),
    ),
    Task(
        *("rotten_tomatoes", "classification", {"text": "text", "label": "label"}, ("accuracy",)),
        dataset="embedded/rotten_tomatoes",
        labels=("rotten", "fresh"),
    ),
    Task(
        *("roget", "classification", {"text": "text", "label": "label"}, ("accuracy",)),
        dataset="embedded/roget",
    ),
    *completion.TASKS,
    _own("text_classification", "classification", ("accuracy",), "text", "label"),
    _own("pair_classification", "classification", ("accuracy",), "text", "pair", "label"),
    _own("regression", "classification", ("pearson", "spearman"), "text", "label", labels=()),
    _own("question_answering", "question_answering", ("exact_match", "f1"), *_SQUAD),
    _own("summarisation", "summarisation", _ROUGE, "document", "summary"),
)


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        OptionError: There is none; the text names the closest.

    Example:
        >>> find_task("rte").metrics
        ('accuracy',)
    """
    for task in TASKS:
        if task.name == name:
            return task
    names = [task.name for task in TASKS]
    raise OptionError(f"task={name!r} is unknown{closest(name, names)}; there are {', '.join(names)}")


#: The modules satisfy the protocol. They import transformers inside their functions, so that a list of tasks is cheap.
_KINDS: Mapping[Kind, TaskKind] = {
    "classification": classification,
    "question_answering": question_answering,
    "summarisation": summarisation,
    "completion": completion,
}


def kind_of(task: Task) -> TaskKind:
    """Return how tasks like this one are loaded, prepared and measured.

    Example:
        >>> kind_of(find_task("rte")).TASK_TYPE
        'SEQ_CLS'
    """
    return _KINDS[task.kind]


def load_model(
    path: str | Path, task: Task, rows: DatasetDict, *, seed: int, **from_pretrained: Any
) -> PreTrainedModel:
    """Return a base model with the head that a task needs.

    Args:
        path: A folder or a hub name.
        task: The task.
        rows: Its rows; a classifier's labels may be read from them.
        seed: Decides weights that the files lack; the global generators are left as they were.
        from_pretrained: Passed on, such as ``dtype`` or ``gguf_file``.

    Raises:
        DataError: There is no such model.
    """
    head = classification.head(task, rows) if task.kind == "classification" else {}
    return load_pretrained(LOADERS[kind_of(task).TASK_TYPE], path, seed=seed, **head, **from_pretrained)
