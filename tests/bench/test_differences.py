"""Differences between rows, paired by seed: closed forms on records that are written here."""

import pytest
from test_bench import grid_of, record

from weightlora.bench.grid import Point
from weightlora.bench.table import make_differences, make_table
from weightlora.cli import main
from weightlora.errors import OptionError

METHODS = {"lora": None, "a": {"method": "random", "adapters": 1}, "b": {"method": "random", "adapters": 2}}


def losses(grid, values):
    """A record for each row and seed, with these losses."""
    points = {(row.label, seed): Point(row, {"learning_rate": 1e-3}, seed) for row in grid.rows for seed in grid.seeds}
    made = [record(points[place], 0.5, 0.5) for place in values]
    return [{**r, "metrics": {"validation_loss": v}} for r, v in zip(made, values.values(), strict=True)]


@pytest.fixture
def grid(tmp_path):
    return grid_of(tmp_path, methods=METHODS, learning_rates=[1e-3], metric="loss")


def cells(table):
    return {row[0].text: row[1].text for row in table.rows}


def test_a_difference_is_paired_by_seed(grid):
    # Seeds differ by 1.0, rows by 0.1 and 0.3: unpaired, the error would be 0.5.
    values = {("lora", 0): 1.0, ("lora", 1): 2.0, ("a", 0): 1.1, ("a", 1): 2.3}
    found = cells(make_differences(grid, losses(grid, values), ["lora"]))
    assert found == {"lora": "+0.000 ± 0.000", "a": "+0.200 ± 0.100", "b": "–"}


def test_the_metric_that_chooses_rates_has_differences_too(tmp_path):
    grid = grid_of(tmp_path, methods=METHODS, learning_rates=[1e-3], seeds=[0], tuning_metric="loss")
    metrics = {"lora": (0.5, 0.7), "a": (0.75, 0.6)}  # accuracy, loss
    made = [
        (record(Point(row, {"learning_rate": 1e-3}, 0), 0, 0), metrics[row.label])
        for row in grid.rows
        if row.label in metrics
    ]
    found = [{**r, "metrics": {"validation_accuracy": one, "validation_loss": two}} for r, (one, two) in made]
    table = make_differences(grid, found, ["lora"])
    assert table.header == ("minus lora", "rotten_tomatoes accuracy", "rotten_tomatoes loss")
    assert [cell.text for cell in table.rows[1]] == ["a", "+25.0", "-0.100"]


def test_of_several_rows_the_mean_is_taken_seed_by_seed(grid):
    values = {("lora", 0): 1.0, ("a", 0): 1.1, ("b", 0): 1.3, ("lora", 1): 2.0, ("a", 1): 2.0}
    found = cells(make_differences(grid, losses(grid, values), ["a", "b"]))
    assert found == {"lora": "-0.200 (1 of 2 seeds)", "a": "-0.100 (1 of 2 seeds)", "b": "+0.100 (1 of 2 seeds)"}


def test_a_row_that_is_not_there_is_named(grid):
    with pytest.raises(OptionError, match="against='c' is no row; there are lora, a, b"):
        make_differences(grid, [], ["c"])


@pytest.mark.usefixtures("grid")
def test_a_wrong_row_on_the_command_line_is_found_before_anything_runs(tmp_path, capsys):
    words = ["bench", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(tmp_path / "out"), "--against", "c"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_of_losses_the_smallest_is_the_best_and_chooses_the_rate(tmp_path):
    rates = [1e-3, 1e-2]
    grid = grid_of(tmp_path, methods=METHODS, learning_rates=rates, metric="loss", seeds=[0])
    found = []
    for row, rate, held_out in (
        (row, rate, rate * (10 if row.label == "a" else -10)) for row in grid.rows for rate in rates
    ):
        made = record(Point(row, {"learning_rate": rate}, 0), 0.5, 0.5)
        found.append({**made, "metrics": {"held_out_loss": held_out, "validation_loss": rate}})
    table = make_table(grid, found)
    column = table.header.index("rotten_tomatoes loss")
    assert {row[0].text: (row[column].text, row[column].place) for row in table.rows} == {
        "lora": ("0.010", 2),
        "a": ("0.001", 1),
        "b": ("0.010", 2),
    }


def test_a_metric_that_is_not_measured_is_named(tmp_path):
    with pytest.raises(OptionError, match="metric='f1' is not measured on rotten_tomatoes; give one of accuracy, loss"):
        grid_of(tmp_path, metric="f1")
