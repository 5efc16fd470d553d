"""The arithmetic of benchmarks/choice: a fit on sets of sites, labels of other rows, and loss over time."""

import hashlib
import os
import re
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from selecting import STUDY
from test_bench import grid_of, record

from weightlora import select
from weightlora.bench.grid import Point, read_grid
from weightlora.files import read_mapping
from weightlora.plan.plan import AdapterPlan

CHOICE = Path(__file__).parents[2] / "benchmarks" / "choice"


@pytest.fixture(scope="module")
def ceiling():
    return runpy.run_path(str(CHOICE / "ceiling.py"))


@pytest.fixture(scope="module")
def fit(ceiling):
    return ceiling["fit"]


def random_sets(seed):
    return np.random.default_rng(seed).permuted(np.tile(np.arange(36) < 4, (30, 1)), axis=1).astype(float)


def test_the_fit_finds_what_each_site_saves_where_the_loss_adds_up(fit):
    """Without noise, and with more sets than sites, the fit is the truth up to its small penalty."""
    masks = np.random.default_rng(0).integers(0, 2, (60, 8)).astype(float)
    worth = np.arange(8) / 10
    share, found = fit(masks, 2 - masks @ worth)
    assert share > 0.999
    np.testing.assert_allclose(found, worth, atol=1e-3)


def test_the_share_is_that_of_sets_left_out(fit):
    """Slow reference: a fit to the other sets, with a constant that is not penalised, predicts each set."""
    masks, losses = random_sets(1), np.random.default_rng(2).normal(size=30)
    best = -np.inf
    for penalty in np.logspace(-2, 3, 26):
        missed, missed_by_mean = [], []
        for left in range(30):
            x, y = np.delete(masks, left, 0), np.delete(losses, left)
            centred = x - x.mean(0)
            slope = np.linalg.solve(centred.T @ centred + penalty * np.eye(36), centred.T @ y)
            missed.append(losses[left] - y.mean() - (masks[left] - x.mean(0)) @ slope)
            missed_by_mean.append(losses[left] - y.mean())
        best = max(best, 1 - np.square(missed).sum() / np.square(missed_by_mean).sum())
    share, _ = fit(masks, losses)
    assert share == pytest.approx(best)
    assert share < 0.2  # noise: there is nothing to predict


def test_equal_sets_are_fitted_once(ceiling):
    losses, kept = {"a": 1.0, "b": 2.0, "c": 1.0}, {"a": {"x", "y"}, "b": {"z"}, "c": {"y", "x"}}
    assert ceiling["distinct"](losses, kept) == {frozenset("xy"): 1.0, frozenset("z"): 2.0}


@pytest.mark.slow
def test_the_study_runs_every_stage_and_each_can_be_read(tmp_path):
    """Stand-ins of ``weightlora`` and ``python`` write its commands down; the study itself writes predicted.yaml."""
    for name in ("weightlora", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n')
        (tmp_path / name).chmod(0o755)
    subprocess.run([CHOICE / "study"], env={**os.environ, "BIN": str(tmp_path)}, check=True)
    used = set()
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines() if "predicted.yaml" not in line]
    for program, *words in asked:
        files = [CHOICE.parents[1] / word for word in words if ".yaml" in word or word.endswith(".py")]
        assert all(Path(str(file).partition("#")[0]).exists() for file in files)
        if program == "weightlora":
            assert read_grid(files).rows
        used.update(files)
    assert used >= set(CHOICE.glob("*.py"))
    for file in CHOICE.glob("*.yaml"):
        assert used >= {CHOICE / f"{file.name}#{name}" for name in read_mapping(file)}


def test_plans_are_unpacked_under_their_hash_as_they_were_packed(tmp_path):
    """Each plan that a stage or predicted.yaml names is among those of the study."""
    script = runpy.run_path(str(CHOICE / "plans.py"))
    script["pack"](tmp_path / "one", ['{"a":1}\n'])
    script["pack"](tmp_path / "one", ['{"b":"é"}\n', '{"a":1}\n'])
    paths = script["unpack"](tmp_path / "one", tmp_path / "plans")
    assert [path.read_bytes() for path in paths] == [b'{"a":1}\n', '{"b":"é"}\n'.encode()]
    assert [path.stem for path in paths] == [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths]
    files = [CHOICE / "stages.yaml", script["RESULTS"] / "predicted.yaml"]
    named = {name for file in files for name in re.findall(r"plan: \S+/(\w+)\.json", file.read_text("utf-8"))}
    assert named == {path.stem for path in script["unpack"](script["PACKED"], tmp_path / "all")} != set()
    assert all(AdapterPlan.load(path).ranks for path in (tmp_path / "all").iterdir())


def test_shuffled_labels_are_those_of_other_rows():
    shuffle = runpy.run_path(str(CHOICE / "selections.py"))["with_shuffled_labels"]
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(100)], "label": list(range(100))})
    shuffled = shuffle(rows, seed=0)
    assert shuffled["text"] == rows["text"]
    assert sorted(shuffled["label"]) == list(range(100))
    assert sum(a == b for a, b in zip(shuffled["label"], rows["label"], strict=True)) < 10
    assert shuffle(rows, seed=0)["label"] == shuffled["label"] != shuffle(rows, seed=1)["label"]


def test_dealt_ranks_are_as_many_on_other_sites_of_the_same_shape(minilm):
    deal = runpy.run_path(str(CHOICE / "selections.py"))["with_dealt_ranks"]
    lora = LoraConfig(r=10, lora_alpha=20, task_type="SEQ_CLS")
    chosen = select(minilm, (), lora=lora, adapters=9, rule=STUDY["last_layers"], progress=False)
    dealt = deal(chosen, seed=0)
    assert dealt.names != chosen.names

    def by_shape(plan):
        return sorted((e.site.in_features, e.site.out_features, e.r, e.alpha) for e in plan.entries)

    assert by_shape(dealt) == by_shape(chosen)
    assert dealt.parameters == chosen.parameters
    assert deal(chosen, seed=0).ranks == dealt.ranks != deal(chosen, seed=1).ranks
    assert [e.site for e in dealt.entries] == [e.site for e in chosen.entries]


def test_the_time_of_a_row_is_that_of_its_steps_and_its_selection(tmp_path):
    methods = {"lora": None, "few": {"method": "random", "adapters": 1}, "slow": {"method": "random", "adapters": 2}}
    grid = grid_of(tmp_path, methods=methods, learning_rates=[1e-3], metric="loss", seeds=[0, 1])
    own = {  # loss of two seeds, step, steps, selection of 10 s of training, bytes
        "lora": ((1.0, 1.2), 1.0, 100, 0.0, 30e6),
        "few": ((0.9, 1.0), 0.5, 120, 2.0, 10e6),
        "slow": ((1.1, 1.1), 0.5, 240, 0.0, 20e6),
    }
    records = [
        record(Point(row, {"learning_rate": 1e-3}, seed), 0.5, 0.5, steps=steps, saved_bytes=saved)
        | {"metrics": {"validation_loss": losses[seed]}, "step_ratio": step}
        | {"selection_seconds": selection, "training_seconds": 10.0}
        for row in grid.rows
        for losses, step, steps, selection, saved in [own[row.label]]
        for seed in grid.seeds
    ]
    script = runpy.run_path(str(CHOICE / "pareto.py"))
    rows = script["measured"](grid, records)
    # 0.5 · 120 / 100 = 0.6 of the time, and 2 / 10 of that for the selection; the standard error of two values is half
    # of their difference.
    assert script["table"](rows, "lora").splitlines()[2:] == [
        "| lora | 1.100 ± 0.100 | +0.000 ± 0.000 | 1.00 | 1.00 | 1.00 | 30.0 |  |",
        "| few | 0.950 ± 0.050 | -0.150 ± 0.050 | 0.50 | 0.60 | 0.72 | 10.0 | front |",
        "| slow | 1.100 ± 0.000 | +0.000 ± 0.100 | 0.50 | 1.20 | 1.20 | 20.0 |  |",
    ]
    (panel,) = script["picture"](rows, "lora").panels
    assert [curve.label for curve in panel.curves] == list(own)
    assert [curve.x for curve in panel.curves] == [pytest.approx((x,)) for x in (1.0, 0.72, 1.2)]


def test_finals_pair_each_row_with_random_sites_and_both_loras(tmp_path):
    """The standard error of two differences is half of their difference. LoRA has one seed: only that one counts."""
    methods = {
        "random0, K = 1": {"method": "random", "adapters": 1},
        "few": {"method": "random", "adapters": 2},
        "low_rank": {"method": "lora", "lora_r": 1},
        "lora": None,
        "not run": {"method": "random", "adapters": 3},
    }
    grid = grid_of(tmp_path, methods=methods, learning_rates=[1e-3], metric="loss", seeds=[0, 1])
    own = {"random0, K = 1": (1.0, 1.2), "few": (0.9, 1.0), "low_rank": (0.8, 1.0), "lora": (0.7,)}
    records = [
        record(Point(row, {"learning_rate": 1e-3}, seed), 0.5, 0.5) | {"metrics": {"validation_loss": loss}}
        for row in grid.rows
        for seed, loss in enumerate(own.get(row.label, ()))
    ]
    lines = runpy.run_path(str(CHOICE / "finals.py"))["lines"]
    assert list(lines(grid, records, "lora", "low_rank")) == [
        ("random0, K = 1", "2", "0.001", "1.100 ± 0.100", "", "+0.200 ± 0.000", "+0.300"),
        ("few", "2", "0.001", "0.950 ± 0.050", "-0.150 ± 0.050", "+0.050 ± 0.050", "+0.200"),
        ("low_rank", "2", "0.001", "0.900 ± 0.100", "-0.200 ± 0.000", "", "+0.100"),
        ("lora", "1", "0.001", "0.700", "-0.300", "-0.100", ""),
    ]
    assert [line[-2] for line in lines(grid, records, "lora", "few")] == [
        "+0.150 ± 0.050",
        "",
        "-0.050 ± 0.050",
        "-0.200",
    ]


@pytest.mark.slow
def test_each_stage_of_the_finals_has_records(monkeypatch):
    monkeypatch.chdir(CHOICE.parents[1])
    script = runpy.run_path(str(CHOICE / "finals.py"))
    assert [final.files for final in script["FINALS"] if not list(script["stage"](final))] == []


def test_stability_counts_shared_sites_and_pairs_losses_by_seed(tmp_path):
    """Sets of two seeds share one of three sites: Jaccard 1/3. Random sets of 2 of 8 share 1/2 of 7/2: 1/7."""
    methods = {name: {"method": "random", "adapters": k} for k, name in enumerate(("draw", "same", "half", "all"), 1)}
    grid = grid_of(tmp_path, methods=methods, learning_rates=[1e-3], metric="loss", seeds=[0, 1])
    own = {  # the sites and losses of two seeds
        "draw": (("ab", "cd"), (1.0, 1.2)),
        "same": (("ab", "ab"), (0.9, 1.0)),
        "half": (("ab", "bc"), (1.1, 1.0)),
        "all": (("abcdefgh", "abcdefgh"), (0.5, 0.5)),
    }
    records = [
        record(Point(row, {"learning_rate": 1e-3}, seed), 0.5, 0.5, kept=list(kept), adapters=len(kept), sites=8)
        | {"metrics": {"validation_loss": losses[seed]}}
        for row in grid.rows
        for sets, losses in [own[row.label]]
        for seed, kept in enumerate(sets)
    ]
    script = runpy.run_path(str(CHOICE / "tables.py"))
    rows = script["choices"](grid, records)
    assert script["stability"](rows, ["draw"]).splitlines()[2:] == [
        "| same | 2 | 1.00 | 0.14 | -0.150 ± 0.050 |",
        "| half | 2 | 0.33 | 0.14 | -0.050 ± 0.150 |",
        "| draw | 2 | 0.00 | 0.14 |  |",
    ]
    # A third rule makes the ranks 3, 2, 1 by Jaccard and 2, 1, 3 by loss: 1 - 6 (1 + 1 + 4) / (3 * 8).
    third = script["Choices"]("third", (frozenset("abc"), frozenset("abd")), 8, {0: 0.8, 1: 0.9})
    assert script["stability"]([*rows, third], ["draw"]).endswith("Jaccard and loss over 3 rules: -0.50")


def test_stability_of_one_seed_has_no_line(tmp_path):
    grid = grid_of(tmp_path, methods={"draw": {"method": "random", "adapters": 1}}, learning_rates=[1e-3], seeds=[0, 1])
    runs = [record(Point(grid.rows[0], {"learning_rate": 1e-3}, 0), 0.5, 0.5, kept=["a"], adapters=1, sites=2)]
    assert runpy.run_path(str(CHOICE / "tables.py"))["choices"](grid, runs) == []


def test_stability_against_rows_without_two_seeds_is_one_line(tmp_path, monkeypatch, capsys):
    """None has run yet; the results are where the command runs."""
    monkeypatch.chdir(tmp_path)
    grid_of(tmp_path, methods={"draw": {"method": "random", "adapters": 1}}, learning_rates=[1e-3], output_dir="out")
    monkeypatch.setattr("sys.argv", ["tables.py", "stability", "b.yaml", "--against", "draw"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(CHOICE / "tables.py"), run_name="__main__")
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "tables.py: error: --against draw: no two seeds in out that keep some of the sites"
