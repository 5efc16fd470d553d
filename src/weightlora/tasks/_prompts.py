"""Prompt and completion of a row, in lm-evaluation-harness's words, so that training and evaluation use one text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError, require_extra
from weightlora.tasks._values import is_text
from weightlora.tasks.base import Place, Task
from weightlora.text import closest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = Mapping[str, Any]

#: Puzzles drawn for each distinct row wanted; with fewer distinct rows the generator has too few.
_DRAWS = 10
#: The generator whose puzzles are read as contexts with an answer in them.
_HAYSTACK = "needle_haystack"
_REQUEST = " Reply only with a name."


# -- prompts ---------------------------------------------------------------------------------------------------------


def mathqa(row: Row) -> tuple[str, str]:
    r"""Return a problem and the text of its right option: the harness scores the texts, not their letters.

    Example:
        >>> mathqa({"problem": "1 + 1 = ?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"})
        ('Question: 1 + 1 = ?\nAnswer:', '2')
    """
    options = [found[4:].rstrip(" ,") for found in re.findall(r"[abcd] \) .*?, |e \) .*?$", row["options"])]
    return f"Question: {row['problem']}\nAnswer:", options["abcde".index(row["correct"])]


def gsm8k(row: Row) -> tuple[str, str]:
    """Return a question and its worked answer, which ends with ``#### number``."""
    return f"Question: {row['question']}\nAnswer:", row["answer"]


def hellaswag(row: Row) -> tuple[str, str]:
    """Return the beginning of a story and its right ending."""
    beginning = f"{row['activity']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _without_marks(beginning), _without_marks(row["endings"][int(row["label"])])


def _without_marks(text: str) -> str:
    """Return a text of WikiHow without its ``[title]``, ``[step]`` and the like."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def boolq(row: Row) -> tuple[str, str]:
    """Return a passage with a question, and yes or no."""
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", "yes" if row["answer"] else "no"


def arc(row: Row) -> tuple[str, str]:
    """Return a question and the text of its right choice."""
    right = row["choices"]["label"].index(row["answer"])
    return f"Question: {row['question']}\nAnswer:", row["choices"]["text"][right]


def own_text(row: Row) -> tuple[str, str]:
    """Return the user's own prompt and completion; numbers become text."""
    for role in ("prompt", "completion"):
        if not is_text(row[role]):
            raise ValueError(f"{role} is {row[role]!r}, which is no text")
    return str(row["prompt"]), str(row["completion"])


def last_turn(messages: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return a conversation up to its last assistant message, and that message.

    Example:
        >>> last_turn([{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}])[1]
        [{'role': 'assistant', 'content': '2'}]
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise ValueError("no assistant message answers another message")
    for message in messages[: answers[-1] + 1]:
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise ValueError(f"the content of a message is {message['content']!r}, which is no text")
    return list(messages[: answers[-1]]), [messages[answers[-1]]]


#: By the name of the task; all others are the user's own texts.
PROMPTS: Mapping[str, Callable[[Row], tuple[str, str]]] = {
    "mathqa": mathqa,
    "gsm8k": gsm8k,
    "hellaswag": hellaswag,
    "boolq": boolq,
    "arc_challenge": arc,
    "reasoning_gym": own_text,
}


def to_prompts(task: Task, rows: Dataset, split: str, *, chat: bool) -> Dataset:
    """Return the rows as TRL takes them: ``prompt`` and ``completion``, and ``entry`` where the task has it.

    A conversation also has ``chat_template_kwargs``. Templates of reasoning models write an empty thought before an
    answer that has none; before an answer to be generated they do so only if these arguments say it.

    Args:
        task: The roles of its columns are those of its prompt.
        rows: A split of its rows.
        split: The name of that split, for errors.
        chat: Prompts become conversations, not plain text. Then, as in the harness, no blank precedes the answer.

    Raises:
        DataError: A row is not as the task needs it.
    """
    from datasets import Dataset

    if "messages" in task.columns and not chat:
        raise DataError(
            f"{task.name} has conversations and the tokenizer has no chat template; take the tokenizer of an instruct "
            "model, or task=completion with plain texts"
        )
    return Dataset.from_list(list(_examples(task, rows, Place(f"the split {split!r}"), chat=chat)))


def check_prompts(task: Task, rows: Dataset, place: Place) -> None:
    """Raise where a row has no prompt or no completion.

    Raises:
        DataError: With the row.
    """
    for _ in _examples(task, rows, place, chat="messages" in task.columns):
        pass


def _examples(task: Task, rows: Dataset, place: Place, *, chat: bool) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        roles = {role: dict(row)[column] for role, column in task.columns.items()}
        try:
            yield _example(task, roles, chat)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            like = f"as in {task.dataset}" if task.dataset else "each of them filled in"
            raise DataError(
                f"{place.row(number)} is no row of {task.name} ({error}): "
                f"{shorten(repr(roles), 200)}; it needs {', '.join(task.columns)}, {like}"
            ) from error


def _example(task: Task, row: Row, chat: bool) -> dict[str, Any]:
    if "messages" in row:
        prompt, completion = last_turn(row["messages"])
    else:
        prompt, completion = PROMPTS.get(task.name, own_text)(row)
        if chat:
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        elif task.name in PROMPTS:
            completion = f" {completion}"
    example: dict[str, Any] = {"prompt": prompt, "completion": completion}
    if chat:
        answer: Any = completion[-1]
        example["chat_template_kwargs"] = template_options(thinking="</think>" in answer["content"])
    if "entry" in row:
        example["entry"] = row["entry"]
    return example


def to_texts(task: Task, rows: Dataset, split: str) -> Dataset:
    """Return the rows with one column, ``text``, as TRL takes them.

    Args:
        task: Its role ``text`` says which column.
        rows: A split of its rows.
        split: The name of that split, for errors.

    Raises:
        DataError: A row has no text.
    """
    from datasets import Dataset

    check_whole_texts(task, rows, Place(f"the split {split!r}"))
    return Dataset.from_dict({"text": [str(text) for text in rows[task.columns["text"]]]})  # some are numbers


def check_whole_texts(task: Task, rows: Dataset, place: Place) -> None:
    """Raise where a row has no text to learn.

    Raises:
        DataError: With the row.
    """
    for number, text in enumerate(rows[task.columns["text"]]):
        if not is_text(text) or text == "":
            raise DataError(f"{place.row(number)} has no text: {text!r}; fill it in or remove the row")


def template_options(*, thinking: bool = False) -> dict[str, Any]:
    """Return the arguments of a chat template in training, generation and the harness; most templates ignore them."""
    return {"enable_thinking": thinking}


# -- reasoning gym ---------------------------------------------------------------------------------------------------


def reasoning_rows(generator: str, train: int, validation: int, seed: int, **settings: Any) -> DatasetDict:
    """Return puzzles of a generator of ``reasoning_gym`` in two splits that share no question.

    Args:
        generator: Such as ``"chain_sum"``.
        train: Puzzles to train on.
        validation: Puzzles to measure on; they do not depend on ``train``.
        seed: Decides the puzzles.
        settings: The generator's own, such as ``min_terms`` of ``chain_sum``.

    Raises:
        DataError: The generator has too few questions, or no answers to train on.
        MissingPackageError: The package ``reasoning_gym`` is not installed.
        OptionError: There is no such generator, or it has no such setting.
    """
    from datasets import Dataset, DatasetDict

    # A generator makes row i from seed + i: consecutive seeds would give nearly the same rows.
    draw, seen = random.Random(seed), set[str]()
    splits: dict[str, Dataset] = {}
    for split, count in (("validation", validation), ("train", train)):
        puzzles = _puzzles(generator, {**settings, "size": _DRAWS * count, "seed": draw.getrandbits(31)})
        splits[split] = Dataset.from_list(_distinct(puzzles, count, seen))
        if len(splits[split]) < count:
            raise DataError(
                f"{_DRAWS * count} draws of {generator!r} had {len(splits[split])} new questions for {split}, not "
                f"{count}; lower train={train} or validation={validation}, or make the puzzles larger"
            )
    return DatasetDict({split: splits[split] for split in ("train", "validation")})


def passages(generator: str, train: int, validation: int, seed: int, **settings: Any) -> DatasetDict:
    """Return rows of SQuAD's columns; their contexts are statements, and the answer is the name in one of them.

    "Anna likes rain. Omar fears maths." is asked "Who fears maths?".

    Args:
        generator: ``"needle_haystack"``.
        train: Questions to train on.
        validation: Questions to measure on; they do not depend on ``train``.
        seed: Decides the rows.
        settings: ``min_num_statements`` and ``max_num_statements`` of a context.

    Raises:
        MissingPackageError: The package ``reasoning_gym`` is not installed.
        OptionError: It is another generator, or it has no such setting.
    """
    if generator != _HAYSTACK:
        raise OptionError(
            f"reasoning_gym/{generator} is not read as contexts with answers; give reasoning_gym/{_HAYSTACK}, "
            "or take task=reasoning"
        )
    puzzles = reasoning_rows(generator, train, validation, seed, **settings)
    return puzzles.map(_passage, with_indices=True, remove_columns=puzzles["train"].column_names)


def _passage(puzzle: dict[str, Any], number: int) -> dict[str, Any]:
    statements, _, question = puzzle["prompt"].rpartition("\n")
    context, question, name = statements.strip(), question.removesuffix(_REQUEST), puzzle["completion"]
    said = question.removeprefix("Who ").removesuffix("?")
    start = f" {context}".index(f" {name} {said}.")  # a name may be in several statements, and within other names
    answers = {"text": [name], "answer_start": [start]}
    return {"id": str(number), "question": question, "context": context, "answers": answers}


def _puzzles(generator: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    require_extra("reasoning_gym", "llm")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        known = closest(generator, DATASETS)
        raise OptionError(f"generator={generator!r} is unknown{known}; reasoning_gym has {', '.join(sorted(DATASETS))}")
    try:
        puzzles = reasoning_gym.create_dataset(generator, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # what generators raise on a wrong setting
        raise OptionError(f"generator={generator!r} does not take {settings}: {error}") from error
    return iter(puzzles)


def _distinct(puzzles: Iterator[dict[str, Any]], count: int, seen: set[str]) -> list[dict[str, str]]:
    """Return up to ``count`` rows whose questions are not in ``seen`` yet, and add them to it."""
    rows: list[dict[str, str]] = []
    while len(rows) < count and (puzzle := next(puzzles, None)) is not None:
        question, answer = puzzle["question"], puzzle["answer"]
        if not isinstance(answer, str):
            name = puzzle["metadata"]["source_dataset"]
            raise DataError(f"generator={name!r} gives no answers, so there is nothing to train on; take another")
        if question not in seen:
            seen.add(question)
            rows.append({"prompt": question, "completion": answer, "entry": json.dumps(puzzle, default=str)})
    return rows


def solves(answer: str, entry: str) -> bool:
    """Return whether ``answer`` solves the puzzle, in any form that its generator accepts.

    Args:
        answer: What the model wrote.
        entry: The puzzle as :func:`reasoning_rows` stored it.
    """
    import reasoning_gym

    puzzle = json.loads(entry)
    if answer == puzzle["answer"]:  # some scorers compare tuples, which JSON makes lists of
        return True
    score: Any = reasoning_gym.get_score_answer_fn(puzzle["metadata"]["source_dataset"])
    try:
        return score(answer, puzzle) == 1
    except Exception:  # some scorers parse the answer and raise whatever their parser raises
        return False
