"""Figures: curves, heat maps and Jaccard matrices are those of the records, and the files name their axes."""

import json
import math
from itertools import combinations

import pytest
from PIL import Image
from test_paper import FOLDER, NAMES, write_study

from weightlora.bench.grid import Point
from weightlora.cli import main
from weightlora.paper.picture import Curve, Heat, Lines, Picture, draw
from weightlora.paper.results import jaccard, results_of
from weightlora.paper.study import read_study

AXES = {"x": "adapters", "x_label": "adapters kept, K", "y": "metric", "y_label": "accuracy, %"}
GRID = {
    "base": {"use_cpu": True},
    "methods": {"lora": None, "random": None},
    "limits": [{"adapters": 2}, {"adapters": 10}],
    "learning_rates": [1e-3],
    "seeds": [0, 1, 2],
}


def study_of(folder, kind, grid=None, **more):
    write_study(folder, "small", grid or GRID, kind=kind, **more)
    return read_study("small", folder)


def record(point, **more):
    return {"options": point.options, "status": "ok", "metrics": {"validation_accuracy": 0.5}, **more}


def accuracy(value):
    return {"metrics": {"validation_accuracy": value}}


# -- curves ----------------------------------------------------------------------------------------------------------


def test_a_point_is_the_mean_over_the_seeds_with_its_standard_error(tmp_path):
    study = study_of(tmp_path, "lines", axes=AXES)
    grid = study.grid("embedded", tmp_path)
    values = {"lora": (0.9, 0.9, 0.9), "random, K = 2": (0.5, 0.6, 0.7), "random, K = 10": (0.8, 0.8, 0.8)}
    records = [
        record(Point(row, {"learning_rate": 1e-3}, seed), **accuracy(value))
        for row in grid.rows
        for seed, value in enumerate(values[row.label])
    ]
    records.append(record(Point(grid.rows[1], {"learning_rate": 1e-3}, 7), **accuracy(0.0)))  # a seed of another study
    results = results_of(study, "embedded", grid, records)
    ((panel,),) = (results.picture.panels,)
    plain, random = panel.curves
    assert (panel.x_label, panel.y_label) == ("adapters kept, K", "accuracy, %")
    assert (plain.label, plain.x, plain.y) == ("lora", (), pytest.approx((90.0,)))  # no K: a horizontal line
    assert (random.label, random.x, random.y) == ("random", (2.0, 10.0), pytest.approx((60.0, 80.0)))
    assert random.error == pytest.approx((10 / math.sqrt(3), 0.0))  # the sample's deviation is ten points
    assert [cell.text for cell in results.table.rows[1]] == ["random", "60 ± 5.8", "80 ± 0", ""]
    assert results.table.header == ("method", "adapters = 2", "adapters = 10", "no limit")


@pytest.mark.parametrize(
    ("measure", "wanted"),
    [("saved_bytes", 3.0), ("minutes", 2.5)],  # 3e6 bytes; 30 + 120 seconds
)
def test_memory_and_time_come_from_the_records(tmp_path, measure, wanted):
    study = study_of(tmp_path, "lines", axes={**AXES, "y": measure})
    grid = study.grid("embedded", tmp_path)
    costs = {"saved_bytes": 3_000_000, "selection_seconds": 30.0, "training_seconds": 120.0}
    point = Point(grid.rows[1], {"learning_rate": 1e-3}, 0)
    failed = {"options": Point(grid.rows[1], {"learning_rate": 1e-3}, 1).options, "status": "failed", "error": "x"}
    results = results_of(study, "embedded", grid, [record(point, **costs), failed])
    (curve,) = results.picture.panels[0].curves
    assert (curve.y, curve.error) == ((wanted,), (0.0,))
    assert results.table.rows[1][1].text == f"{wanted:g} (1 of 3 runs, 1 failed)"


def test_the_papers_points_are_drawn_only_where_the_set_up_is_the_papers(tmp_path):
    published = {"points": [{"series": "lora", "x": 10, "y": 51.25}]}
    study = study_of(tmp_path, "lines", axes=AXES, published=published)
    grid = study.grid("embedded", tmp_path)
    records = [record(Point(grid.rows[0], {"learning_rate": 1e-3}, 0))]
    curves = results_of(study, "embedded", grid, records).picture.panels[0].curves
    assert [curve.label for curve in curves] == ["lora"]
    full = read_study("figure3", FOLDER)
    grid = full.grid("full", tmp_path, checked=False)
    point = Point(grid.rows[0], grid.rows[0].choices[0], 0)
    found = results_of(full, "full", grid, [record(point, metrics={"gsm8k_exact_match_strict_match": 0.4})])
    plain, *published = found.picture.panels[0].curves
    assert (plain.label, plain.x, plain.y) == ("lora", (2.0,), (40.0,))
    assert [(c.label, c.x, c.y) for c in published] == [
        ("lora, paper", (16,), (51.25,)),
        ("weightlora_plus, paper", (16,), (54.71,)),
    ]


# -- heat maps -------------------------------------------------------------------------------------------------------


def test_a_heat_map_has_k_across_and_t_down(tmp_path):
    methods = {f"weightlora, T = {t}": {"method": "weightlora", "steps": t} for t in (5, 20)}
    axes = {**AXES, "rows": "steps", "rows_label": "scoring steps, T"}
    study = study_of(tmp_path, "heat_map", {**GRID, "methods": {"lora": None, **methods}}, axes=axes)
    grid = study.grid("embedded", tmp_path)
    values = {(None, None): 0.7, (5, "2"): 0.1, (5, "10"): 0.2, (20, "10"): 0.4}  # T = 20 with K = 2 was not run
    rows = {(row.options.get("steps"), row.options.get("adapters")): row for row in grid.rows}
    points = {cell: [Point(rows[cell], {"learning_rate": 1e-3}, seed) for seed in grid.seeds] for cell in values}
    records = [record(point, **accuracy(values[cell])) for cell in values for point in points[cell]]
    for point in points[5, "10"][1:]:
        records[[found["options"] for found in records].index(point.options)] |= {"status": "failed", "error": "x"}
    results = results_of(study, "embedded", grid, records)
    ((heat,),) = (results.picture.panels,)
    assert (heat.columns, heat.rows) == (("2", "10"), ("5", "20"))
    assert heat.values == (pytest.approx((10.0, 20.0)), (None, pytest.approx(40.0)))
    assert heat.notes == (("± 0", "1 of 3 runs"), ("", "± 0"))
    assert heat.title == "weightlora (lora 70 ± 0)"
    assert (heat.x_label, heat.y_label, heat.value_label) == ("adapters kept, K", "scoring steps, T", "accuracy, %")


# -- Jaccard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", range(11))
def test_jaccard_of_ten_and_ten(shared):
    """|A∩B| = s of K = 10 each: s / (20 − s); the paper's 0.82 is s = 9."""
    one = {f"site {i}" for i in range(10)}
    other = {f"site {i}" for i in range(10 - shared, 20 - shared)}
    assert jaccard(one, other) == pytest.approx(shared / (20 - shared))


def test_the_matrix_is_that_of_the_kept_sites(tmp_path):
    study = study_of(tmp_path, "jaccard", {**GRID, "methods": {"random": {"adapters": 2}, "lora": None}})
    grid = study.grid("embedded", tmp_path)
    kept = (["a", "b"], ["a", "b"], ["b", "c"])
    records = [
        record(Point(grid.rows[0], {"learning_rate": 1e-3}, seed), kept=kept[seed], sites=4) for seed in range(3)
    ]
    results = results_of(study, "embedded", grid, records)
    ((heat,),) = (results.picture.panels,)  # LoRA has no record
    third = 1 / 3
    assert heat.values == ((1, 1, third), (1, 1, third), (third, third, 1))
    assert heat.columns == ("0", "1", "2")
    assert heat.limits == (0, 1)  # a scale of its own would make any two matrices look alike
    random, lora = results.table.rows
    # Two of four at random share 0, 1, 2 of 2 in 1, 4, 1 of 6 cases: Jaccard (0 + 4/3 + 1) / 6.
    sets = [jaccard(one, "ab") for one in combinations("abcd", 2)]
    chance = f"{sum(sets) / 6:.2f}"
    assert [cell.text for cell in random] == ["random", "2", "3", "0.56", "0.33", "1 of 3", chance]
    assert [cell.text for cell in lora][:3] == ["lora", "–", "0"]


# -- computed memory -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A small Llama, computed at two K; ``draw`` wrote four files."""
    folder = tmp_path_factory.mktemp("computed")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "llama"}
    entry = {"title": "small", "config": "config.json", "task_type": "CAUSAL_LM", "rows": 2, "length": 6}
    entry |= {"ranks": [4], "lora_dropout": 0.0, "adapters": [4, 28], "limit_gb": 1}
    entry["methods"] = ["LoRA", "WeightLoRA upper", "WeightLoRA lower", "WeightLoRA+ upper"]
    write_study(folder / "recipes", "small", GRID, kind="lines", axes=AXES, embedded={"memory": [entry]})
    (folder / "recipes" / "config.json").write_text(json.dumps(sizes))
    words = ["--recipes", str(folder / "recipes"), "--output_dir", str(folder / "out")]
    assert main(["paper", "small", *words]) == 0
    return folder


@pytest.mark.slow
def test_memory_is_computed_without_a_run(computed, capsys):
    lines = (computed / "out" / "embedded" / "small.md").read_text().splitlines()
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in lines) if len(cells) > 3}
    assert rows["method"] == [" K = 4 ", " K = 28 "]
    lora, upper = rows["LoRA"], rows["WeightLoRA upper"]
    assert lora[0] == lora[1]
    assert upper[1] == lora[1]  # all of 4 · 7 sites are kept
    assert "1 GB" in rows
    words = ["--recipes", str(computed / "recipes"), "--output_dir", str(computed / "out")]
    assert main(["paper", "small", *words, "--seed", "1"]) == 2
    assert "takes no options of a run; leave out --seed" in capsys.readouterr().err
    assert main(["paper", *words]) == 0
    assert "computed" in capsys.readouterr().out


# -- the files -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_png_and_a_pdf(computed):
    with Image.open(computed / "out" / "embedded" / "small.png") as image:
        image.verify()
        assert image.format == "PNG"
    pdf = (computed / "out" / "embedded" / "small.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")


def test_a_file_names_axes_curves_and_values(tmp_path):
    """An SVG has its texts as comments beside the outlines of their letters."""
    curves = (Curve("random", (1, 5), (50.0, 60.0), (1.0, 2.0)), Curve("plain LoRA", (), (55.0,), (0.5,)))
    lines = Lines("one", "adapters kept, K", "accuracy, %", curves)
    heat = Heat("other", "kept", "scoring steps, T", "exact match, %", ("1", "5"), ("20",), ((12.5, None),))
    draw(Picture("Both (Figure 4)", (lines, heat)), tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()
    for word in (
        "adapters kept, K",
        "accuracy, %",
        "random",
        "plain LoRA",
        "scoring steps, T",
        "exact match, %",
        "12.5",
    ):
        assert f"<!-- {word} -->" in text
    assert "<!-- no such word -->" not in text


@pytest.mark.parametrize("few", [True, False])
def test_a_tick_for_each_value_only_where_values_are_few_by_nature(few, tmp_path):
    lines = Lines("", "time", "loss", (Curve("lora", (1.03, 7.01), (5.0, 6.0), (0, 0)),), few_ticks=few)
    draw(Picture("", (lines,)), tmp_path / "a.svg")
    assert ("<!-- 1.03 -->" in (tmp_path / "a.svg").read_text()) == few


@pytest.mark.parametrize("panels", [1, 2, 5])
def test_long_titles_stay_inside_the_picture(panels, tmp_path):
    long = "Memory of three methods over the number of adapters that are kept (Figure 7, appendix D)"
    one = Lines(f"weightlora_plus ({long})", "K", "MB", (Curve("lora", (1, 5), (50.0, 60.0), (0, 0)),))
    draw(Picture(f"{long}, {long}", (one,) * panels), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        grey = image.convert("L")
        edges = [grey.crop((x, 0, x + 2, grey.height)).getextrema() for x in (0, grey.width - 2)]
        assert edges == [(255, 255)] * 2  # a title that is cut off reaches the edge
        assert grey.getextrema()[0] < 50  # control: something is drawn


FIGURES = [name for name in NAMES if name.startswith("figure") and name != "figure2"]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_the_paper_names_its_axes_and_what_the_paper_says(name):
    study = read_study(name, FOLDER)
    assert study.published.statements
    assert all("section" in one or "appendix" in one or "Table" in one for one in study.published.statements)
    if study.kind != "jaccard":
        assert study.axes["x_label"]
        assert "," in study.axes["y_label"]  # the unit is behind a comma
