"""The paper's settings beside the recipes', on an excerpt of the paper's Table 8."""

import runpy
from pathlib import Path

import pytest

from weightlora.errors import DataError
from weightlora.paper.study import read_study, recipes_folder

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "paper_settings.py"))
EXCERPT = r"""Table 8: Hyperparameter setup for a model, as in Table 1.

Hyperparameter	Value
Optimizer	Adam
$\beta_1, \beta_2, \epsilon$	0.9, 0.99, 1×10^{-8}
Learning rate	Selected from $\{5 \times 10^{-5}, 5 \times 10^{-4}, 5 \times 10^{-3}\}$
# Epochs	7 (MNLI); 10 (SST-2); 15 (CoLA); 5 (QQP, QNLI); 30 (MRPC); 49 (RTE)
Total # adapters (n)	36
LoRA dropout	0.05

E.2 Something else
"""


@pytest.fixture(scope="module")
def rows():
    return read_study("table1", recipes_folder()).grid("full", Path(), checked=False).rows


def unlike(text, rows):
    """Settings and tasks whose value is not the recipe's."""
    found = SCRIPT["settings_of"](text, 8)
    lines = [(name, *line) for name, value in found.items() for line in SCRIPT["compared"](name, value, rows)]
    return [(name, tasks) for name, tasks, theirs, ours in lines if not SCRIPT["alike"](name, theirs, ours)]


def test_each_number_is_compared_and_what_differs_is_found(rows):
    assert unlike(EXCERPT, rows) == [("Optimizer", "all"), ("# Epochs", "rte")]  # the excerpt's 49 is wrong on purpose
    (reason,) = {SCRIPT["REASONS"][8, "table1", "Optimizer"]}
    assert "authors' code" in reason


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("0.99", "0.999", r"$\beta_1, \beta_2, \epsilon$"),
        ("10^{-8}", "10^{-6}", r"$\beta_1, \beta_2, \epsilon$"),
        (r"5 \times 10^{-4}, ", "", "Learning rate"),
        ("36", "72", "Total # adapters (n)"),
        ("0.05", "0.1", "LoRA dropout"),
        ("5 (QQP, QNLI)", "6 (QQP, QNLI)", "# Epochs"),
    ],
)
def test_a_changed_number_is_a_difference(old, new, named, rows):
    assert old in EXCERPT
    assert len(unlike(EXCERPT.replace(old, new), rows)) == 3
    assert named in dict(unlike(EXCERPT.replace(old, new), rows))


def test_what_cannot_be_read_is_an_error(rows):
    with pytest.raises(DataError, match="no Table 9"):
        SCRIPT["settings_of"](EXCERPT, 9)
    with pytest.raises(DataError, match="'Momentum' is no known setting"):
        unlike(EXCERPT.replace("Optimizer", "Momentum"), rows)
