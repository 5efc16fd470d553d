"""Tables hold what users named and what runs measured: no name becomes markup, no NaN wins; differences by seed."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from test_bench import grid_of, record

from weightlora.bench.engine import adapter_folder, recorded, run_grid
from weightlora.bench.grid import Point, read_grid
from weightlora.bench.records import append_record, by_key
from weightlora.bench.table import (
    Cell,
    Table,
    _places,
    make_differences,
    make_table,
    mean_and_error,
    to_latex,
    to_markdown,
)
from weightlora.cli import main
from weightlora.errors import OptionError

NAN, INF = float("nan"), float("inf")
NAMES = [
    *("a|b", "|", "a\\|b", "<script>alert(1)</script>", "</td></table>", "<!--", "&lt;b&gt;", "a\nb", "a\r\n| c |"),
    *("**bold**", "_it_", "`code`", "[x](javascript:x)", "![x](y)", "~~x~~", "$x$", "\x1b[31mred", "[red]x", "\u2028"),
    *(r"\input{/etc/passwd}", r"a \\ b & c", "100 % _x^2 #~", "{", "}", "[3pt] x", "* x", "$\\write18{x}$", "<>|\"'"),
]
BASE = {"max_train_samples": 16, "held_out_samples": 8, "max_eval_samples": 8, "max_seq_length": 12, "max_steps": 2}


def grid_at(folder, **changed):
    content = {"base": {**BASE, "use_cpu": True}, "methods": ["lora", "random"], "limits": [{"parameters": 0.5}]}
    content |= {"learning_rates": [1e-3], "timing_rounds": 0}
    (folder / "b.yaml").write_text(yaml.safe_dump({**content, **changed}, sort_keys=False))
    return read_grid(folder / "b.yaml", folder / "out")


def table_of(name):
    """A table with a name in each place where a table holds one."""
    rows = ((Cell(name), Cell("1.0", 1), Cell("2")), (Cell("plain"), Cell("0.9", 2), Cell(name)))
    return Table((name, f"task {name}", "whole"), rows, f"Records of different sources: git {name} (1).")


# -- names -----------------------------------------------------------------------------------------------------------


def rendered(markdown):
    """Tags and texts of Markdown as HTML."""
    from markdown_it import MarkdownIt

    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)
    parser.handle_data = texts.append
    parser.feed(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))
    return tags, "".join(texts)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_becomes_markdown_or_html(name):
    """Compared with the table of a plain name: the same tags, and the name is read as it is written."""
    tags, text = rendered(to_markdown(table_of(name)))
    assert tags == rendered(to_markdown(table_of("plain")))[0]
    shown = " ".join(re.sub(r"[\x1b\u2028\r]", lambda odd: odd[0].encode("unicode_escape").decode(), name).split())
    assert " ".join(text.split()).count(shown) >= 4


def test_marks_of_places_stay_markup():
    tags, _ = rendered(to_markdown(table_of("plain")))
    assert (tags.count("strong"), tags.count("u"), tags.count("tr")) == (1, 1, 3)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_becomes_latex(name):
    """Without the escapes, commands, groups and columns are those of the table of a plain name."""
    comment, latex = to_latex(table_of(name)).split("\n", 1)
    own = to_latex(table_of("plain")).split("\n", 1)[1]
    escapes = r"\\(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}|\\[&%_#${}]"
    left = re.sub(escapes, "", latex)
    assert re.findall(r"\\(?:[a-z]+|\\)", left) == re.findall(r"\\(?:[a-z]+|\\)", own)
    assert (left.count("&"), left.count("\n")) == (own.count("&"), own.count("\n"))
    assert left.count("{") == left.count("}")
    assert not re.search(r"[~^#$%]", left)
    assert not re.search(r"^\s*[\[*]", left, re.MULTILINE)  # behind a line's end they are its options
    assert comment.startswith("% ")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the PATH")
def test_latex_compiles(tmp_path):
    body = "\n\n".join(to_latex(table_of(name)) for name in NAMES)
    text = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "t.tex").write_text(text, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_names_of_rows_in_the_files_of_the_command(tmp_path, capsys):
    names = ["a|b", "<script>alert(1)</script>", r"\input{/etc/passwd}", "two\nlines"]
    grid_at(tmp_path, methods={name: {"method": "lora", "lora_r": r + 1} for r, name in enumerate(names)})
    words = ["bench", "--table", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    capsys.readouterr()
    markdown, latex = ((tmp_path / "out" / f"table.{kind}").read_text() for kind in ("md", "tex"))
    assert len(markdown.splitlines()) == 2 + len(names)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()} == {8}  # six columns and the edges
    assert "<script>" not in markdown
    assert r"\input" not in latex


# -- numbers that are none -------------------------------------------------------------------------------------------


def test_what_is_no_number_has_no_place():
    assert _places([0.323, NAN, 0.601, 0.987, 0.001], lower=True) == [2, 0, 0, 0, 1]
    assert _places([NAN, 0.5, INF, None, 0.7, -INF]) == [0, 2, 0, 0, 1, 0]
    assert _places([NAN, INF], lower=True) == [0, 0]
    assert _places([3.0, 1.0, -INF, 2.0], lower=True) == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([NAN], "nan"),
        ([NAN, NAN], "nan"),
        ([0.5, NAN], "nan"),
        ([INF, INF], "inf"),
        ([0.5, -INF], "-inf"),
        ([INF, -INF], "nan"),
        ([1e300, 1e300], "1e+300 ± 0.000"),
        ([1e308, 1e308, 1e308], "1e+308 ± 0.000"),
        ([0.25, 0.75], "0.500 ± 0.250"),  # the standard error of two numbers is half of their distance
    ],
)
def test_a_mean_of_what_is_no_number_is_what_it_is(values, text):
    assert mean_and_error(values, lower=True) == text


def found(point, loss, accuracy=0.5):
    metrics = {
        f"{split}_{name}": v
        for split in ("validation", "held_out")
        for name, v in (("accuracy", accuracy), ("loss", loss))
    }
    times = {"selection_seconds": 1.0, "training_seconds": 3.0}
    counts = {"peak_parameters": 2000, "adapter_parameters": 1000}
    return {"options": point.options, "status": "ok", "metrics": metrics, **times, **counts}


def test_runs_whose_loss_is_nan_end_in_a_table(tmp_path, capsys):
    """Two seeds of LoRA are NaN, one of random; both are read back, and the same call shows them again."""
    grid = grid_at(tmp_path, metric="loss", seeds=[0, 1], learning_rates=[1e-3], methods=["lora", "random", "eva"])
    losses = {"lora": (NAN, NAN), "random": (0.5, INF), "eva": (0.6, 0.8)}
    for row in grid.rows:
        for seed, loss in enumerate(losses[row.label]):
            append_record(grid.output_dir / "records.jsonl", found(Point(row, {"learning_rate": 1e-3}, seed), loss))
    words = ["bench", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(grid.output_dir)]
    for _ in range(2):
        assert main([*words, "--against", "lora"]) == 0  # nothing is left to run
        capsys.readouterr()
        cells = {row[0].text: row[4] for row in make_table(grid, recorded(grid)).rows}
        assert cells == {"lora": Cell("nan"), "random": Cell("inf"), "eva": Cell("0.700 ± 0.100", 1)}
    gains = {row[0].text: row[1].text for row in make_differences(grid, recorded(grid), ["eva"]).rows}
    assert gains == {"lora": "nan", "random": "+inf", "eva": "+0.000 ± 0.000"}
    assert "\\textbf{0.700 $\\pm$ 0.100}" in (grid.output_dir / "table.tex").read_text()


def test_a_rate_whose_loss_is_nan_is_not_chosen(tmp_path):
    rates = [1e-4, 1e-3, 1e-2]
    grid = grid_at(tmp_path, methods=["lora"], learning_rates=rates, tuning_metric="loss", seeds=[0])
    points = [Point(grid.rows[0], {"learning_rate": rate}, 0) for rate in rates]

    def chosen(*losses):
        records = by_key(found(point, loss) for point, loss in zip(points, losses, strict=True))
        return grid.chosen(grid.rows[0], records)["learning_rate"]

    assert chosen(NAN, 0.7, 0.6) == 1e-2
    assert chosen(0.7, NAN, 0.6) == 1e-2
    assert chosen(0.6, 0.7, NAN) == 1e-4
    assert chosen(-INF, 0.7, NAN) == 1e-3
    assert chosen(NAN, INF, NAN) == 1e-4  # all of them failed to learn; the table shows it at the lowest rate
    records = [found(point, NAN) for point in points]
    assert [cell.text for cell in make_table(grid, records).rows[0][4:6]] == ["50.0", "nan"]


def test_an_average_with_nan_is_nan(tmp_path):
    grid = grid_at(tmp_path, tasks=["rotten_tomatoes", "rte"], learning_rates=[1e-3], metric="loss")
    values = {
        ("lora", "rotten_tomatoes"): NAN,
        ("lora", "rte"): 0.1,
        ("random", "rotten_tomatoes"): 0.2,
        ("random", "rte"): 0.4,
    }
    records = [found(Point(row, {"learning_rate": 1e-3}, 0), values[row.label, row.task]) for row in grid.rows]
    assert [row[6] for row in make_table(grid, records).rows] == [Cell("nan"), Cell("0.300", 1)]


def test_a_record_without_the_metric_is_a_dash(tmp_path):
    grid = grid_at(tmp_path, methods=["lora"], learning_rates=[1e-3])
    record = {**found(Point(grid.rows[0], {"learning_rate": 1e-3}, 0), 0.5), "metrics": {}}
    assert make_table(grid, [record]).rows[0][4].text == "–"


# -- folders of adapters ---------------------------------------------------------------------------------------------

ROWS = (
    "..",
    ".",
    "lora+",
    "lora-",
    "a/../../b",
    "/etc",
    "CON",
    "x" * 300,
    "LORA+",
    "ω",
    "a:b*?",
    "a\\b",
    "\x00",
    "-rf",
    "~",
)


def test_the_folder_of_an_adapter_is_its_runs_alone(tmp_path):
    grid = grid_at(
        tmp_path,
        methods={name: {"method": "lora", "lora_r": r + 1} for r, name in enumerate(ROWS)},
        tasks=["rotten_tomatoes", "rte"],
        seeds=[0, 1],
        learning_rates=[1e-3, 2e-3],
    )
    points = [Point(row, choice, seed) for row in grid.rows for choice in row.choices for seed in grid.seeds]
    folders = [adapter_folder(grid, point) for point in points]
    assert len({folder.name.lower() for folder in folders}) == len(points) == len(ROWS) * 2 * 2 * 2
    for point, folder in zip(points, folders, strict=True):
        assert folder.parent == grid.output_dir / "adapters"
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*[A-Za-z0-9]", folder.name)
        assert len(folder.name) <= 120
        for part in (point.row.task, f"seed{point.seed}", f"lr{point.choice['learning_rate']:g}"):
            assert part in folder.name
    assert "-lora+-" in folders[ROWS.index("lora+") * 8].name


@pytest.mark.slow
def test_an_adapter_of_a_row_named_like_a_folder_above_is_kept_with_its_record(tmp_path):
    """One real run: its adapter is below ``adapters``, its record is there, and nothing is anywhere else."""
    grid = grid_at(tmp_path, methods={"..": {"method": "lora"}}, learning_rates=[1e-3], keep_adapters=True)
    records = run_grid(grid, report=lambda _: None)
    assert [record["status"] for record in records] == ["ok"]
    assert records == recorded(grid)
    [kept] = (grid.output_dir / "adapters").iterdir()
    assert (kept / "adapter_model.safetensors").is_file()
    assert {path.name for path in grid.output_dir.glob("[!.]*")} == {"adapters", "records.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"b.yaml", "out"}
    assert json.loads((kept / "adapter_config.json").read_text())["r"] == 8


# -- differences between rows, paired by seed: closed forms on records that are written here -------------------------

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
