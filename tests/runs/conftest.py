"""A small run of ``weightlora train``, once for each file of tests."""

import pytest
from small_run import words, write_base

from weightlora.cli import main


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """The folder of a random encoder with its rows."""
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A finished run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(base, folder)) == 0
    return folder
