"""What is read without transformers is what transformers reads."""

import dataclasses

import pytest
from transformers import HfArgumentParser

from weightlora.runs._parsers import Parser, training_names
from weightlora.runs.recipe import MethodOptions, ModelOptions, TaskOptions
from weightlora.tasks import TASKS, kind_of


@pytest.mark.parametrize("kind", ["classification", "question_answering", "summarisation", "completion"])
def test_names_read_from_the_source_are_those_of_the_class(kind):
    task = next(task for task in TASKS if task.kind == kind)
    made = kind_of(task).arguments_class()
    assert training_names(kind) == {field.name for field in dataclasses.fields(made) if field.init}


def test_our_parser_reads_what_transformers_reads():
    """Every option of ours in several spellings, and values of all types."""
    parts = (ModelOptions, TaskOptions, MethodOptions)
    for words in (
        [],
        ["--lora-r=4", "--adapters", "3", "--use_rslora", "--load_in_4bit", "yes", "--grow_batch", "0", "--fast"],
        [
            "--columns",
            "text=a",
            "label=b",
            "--max_train_samples=7",
            "--dtype=float16",
            "--fast=rank",
            "x",
            "--seed",
            "3",
        ],
        [
            "--head_learning_rate",
            "1e-3",
            "--ranking=spread",
            "--lora_dropout",
            "0.1",
            "--validation_file=a",
            "--train_file=b",
        ],
    ):
        theirs = HfArgumentParser(parts, allow_abbrev=False, add_help=False)
        *wanted, rest = theirs.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        assert Parser(*parts).read(words) == (wanted, rest)
