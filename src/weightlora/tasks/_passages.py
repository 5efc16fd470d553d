"""Questions on generated passages, in SQuAD's form: the needle in a haystack of ``reasoning_gym``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.tasks._prompts import reasoning_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

#: The generator whose puzzles are read as contexts with an answer in them.
GENERATOR = "needle_haystack"
_REQUEST = " Reply only with a name."


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
    if generator != GENERATOR:
        raise OptionError(
            f"reasoning_gym/{generator} is not read as contexts with answers; give reasoning_gym/{GENERATOR}, "
            "or take task=reasoning"
        )
    puzzles = reasoning_rows(generator, train, validation, seed, **settings)
    return puzzles.map(_row, with_indices=True, remove_columns=puzzles["train"].column_names)


def _row(puzzle: dict[str, Any], number: int) -> dict[str, Any]:
    statements, _, question = puzzle["prompt"].rpartition("\n")
    context, question, name = statements.strip(), question.removesuffix(_REQUEST), puzzle["completion"]
    said = question.removeprefix("Who ").removesuffix("?")
    start = f" {context}".index(f" {name} {said}.")  # a name may be in several statements, and within other names
    answers = {"text": [name], "answer_start": [start]}
    return {"id": str(number), "question": question, "context": context, "answers": answers}
