"""``weightlora bench``: what is run, how a rate is chosen, what the table says, and that nothing stops it for good."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from bench_worker import die_at_seed_one, sleep_at_seed_one
from bench_worker import run as run_bench
from fuzz import cases, generator, tell
from safetensors.torch import load_file

from weightlora.bench._workers import Job, run_here, run_job
from weightlora.bench.engine import Where, _keep_log, log_file, recorded, run_grid
from weightlora.bench.grid import Point, read_grid
from weightlora.bench.records import append_record, by_key, key_of
from weightlora.bench.table import make_table, to_latex, to_markdown
from weightlora.cli import main
from weightlora.cost.step_time import Peak, StepCost
from weightlora.errors import DataError, OptionError
from weightlora.files import only_writer
from weightlora.plan.limits import LIMITS
from weightlora.runs.recipe import option_words, read_recipe
from weightlora.runs.train import train

ROOT = Path(__file__).parents[2]
BASE = {
    "max_train_samples": 16,
    "held_out_samples": 8,
    "max_eval_samples": 8,
    "max_seq_length": 12,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "use_cpu": True,
}
SMALL = {
    "base": BASE,
    "methods": {"lora": None, "random": None},
    "limits": [{"adapters": 1}, {"parameters": 0.5}],
    "learning_rates": ["5e-4", 5e-3],
    "seeds": [0, 1],
    "timing_rounds": 1,
}


def grid_of(folder, **changed):
    content = {**SMALL, **changed}
    path = folder / "b.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}, sort_keys=False))
    return read_grid(path, folder / "out")


# -- what is run -----------------------------------------------------------------------------------------------------


def test_methods_times_limits_times_tasks_are_the_rows(tmp_path):
    tasks = {"rotten_tomatoes": {}, "sst2": {"max_seq_length": 64}}
    grid = grid_of(tmp_path, tasks=tasks, limits=[{"adapters": 3}, {"parameters": 0.8}], methods=["lora", "random"])
    shown = [(row.label, row.task, row.options.get("adapters"), row.options.get("parameters")) for row in grid.rows]
    assert shown == [
        ("lora", "rotten_tomatoes", None, None),  # it takes no limits
        ("lora", "sst2", None, None),
        ("random, K = 3", "rotten_tomatoes", "3", None),
        ("random, K = 3", "sst2", "3", None),
        ("random, parameters 0.8", "rotten_tomatoes", None, "0.8"),
        ("random, parameters 0.8", "sst2", None, "0.8"),
    ]
    assert [row.options["max_seq_length"] for row in grid.rows[:2]] == [12, 64]
    assert grid.rows[0].choices == ({"learning_rate": 5e-4}, {"learning_rate": 5e-3})
    assert len(grid.tuning) == len(grid.rows) * len(grid.rows[0].choices)  # one tuning seed
    assert {point.seed for point in grid.tuning} == {0}


def test_limits_are_the_files_the_rows_or_those_of_the_command(tmp_path):
    methods = {"selected": None, "few": {"method": "random", "adapters": 3, "parameters": 0.1}}

    def limits(words=(), **changed):
        grid_of(tmp_path, methods=methods, learning_rates=[1e-3], **changed)
        grid = read_grid(tmp_path / "b.yaml", tmp_path / "out", words)
        return {row.label: {name: row.options[name] for name in LIMITS if name in row.options} for row in grid.rows}

    own = {"few": {"adapters": "3", "parameters": "0.1"}}  # both hold: it is one row
    assert limits(limits=...) == {"selected": {}, **own}  # the default is the method's
    assert limits(limits=[{"time": 0.6}, {"adapters": 0.5, "memory": "8GB"}]) == {
        "selected, time 0.6": {"time": "0.6"},
        "selected, adapters 0.5, memory 8GB": {"adapters": "0.5", "memory": "8GB"},
        **own,
    }
    assert limits(["--parameters", "0.2"]) == {"selected": {"parameters": "0.2"}, **own}


def test_a_row_may_have_rates_of_its_own(tmp_path):
    methods = {"lora": None, "full": {"learning_rates": ["1e-5", 5e-5, 1e-4]}, "random": {"learning_rates": [1e-2]}}
    grid = grid_of(tmp_path, methods=methods, limits=...)
    lora, full, random = grid.rows
    assert [rates_of(row) for row in grid.rows] == [(5e-4, 5e-3), (1e-5, 5e-5, 1e-4), (1e-2,)]
    assert [point.row for point in grid.tuning] == [lora] * 2 + [full] * 3  # one rate needs no tuning
    assert grid.chosen(random, {}) == {"learning_rate": 1e-2}
    assert "learning_rates" not in full.options
    given = read_grid(tmp_path / "b.yaml", tmp_path / "out", ["--learning_rate", "1e-3"])
    assert {rates_of(row) for row in given.rows} == {(1e-3,)}  # the command line wins over both


def rates_of(row):
    return tuple(choice["learning_rate"] for choice in row.choices)


def test_any_option_is_tuned_and_each_combination_is_a_choice(tmp_path):
    tune = {"learning_rate": ["1e-3", 2e-3], "warmup_steps": [0, 20, 0.5]}
    methods = {
        "lora": None,
        "fixed": {"method": "lora", "warmup_steps": 5},
        "own": {"method": "lora", "tune": {"warmup_steps": [7], "weight_decay": [0.0, 0.1]}},
        "short": {"method": "lora", "learning_rates": [1e-2]},
    }
    grid = grid_of(tmp_path, methods=methods, tune=tune, learning_rates=..., limits=...)
    lora, fixed, own, short = grid.rows
    pairs = [(rate, steps) for rate in (1e-3, 2e-3) for steps in (0, 20, 0.5)]
    assert [tuple(choice.values()) for choice in lora.choices] == pairs
    assert fixed.choices == ({"learning_rate": 1e-3}, {"learning_rate": 2e-3})  # the row's own value is not tuned
    assert Point(fixed, fixed.choices[0], 0).options["warmup_steps"] == 5
    assert len(own.choices) == 2 * 1 * 2
    assert rates_of(short) == (1e-2,) * 3
    assert len(grid.tuning) == 6 + 2 + 4 + 3
    assert grid.tuned == {"learning_rate", "warmup_steps", "weight_decay"}
    given = read_grid(tmp_path / "b.yaml", tmp_path / "out", ["--warmup_steps", "3"])
    assert {choice.get("warmup_steps") for row in given.rows for choice in row.choices} == {None}
    assert [row.options["warmup_steps"] for row in given.rows] == [3, 5, 3, 3]  # of those, fixed is the row's own


def test_the_choice_of_several_options_is_the_best_of_all(tmp_path):
    tune = {"learning_rate": [1e-3, 2e-3], "warmup_steps": [0, 20]}
    grid = grid_of(tmp_path, methods=["lora"], tune=tune, learning_rates=..., seeds=[0, 1])
    (row,) = grid.rows
    scores = {(1e-3, 0): 0.5, (1e-3, 20): 0.8, (2e-3, 0): 0.6, (2e-3, 20): 0.7}
    records = [record(Point(row, choice, 0), 0.1, scores[tuple(choice.values())]) for choice in row.choices]
    assert grid.chosen(row, by_key(records)) == {"learning_rate": 1e-3, "warmup_steps": 20}
    assert {point.options["warmup_steps"] for point in grid.tested(by_key(records))} == {20}
    assert make_table(grid, records).rows[0][1].text == "0.001 warmup_steps=20"
    # A record of one rate and no further option is found again: its key is that of the options alone.
    short = grid_of(tmp_path, methods=["lora"], learning_rates=[1e-3], base={**BASE, "warmup_steps": 20})
    assert {point.key for point in short.tested({})} == {point.key for point in grid.tested(by_key(records))}


def test_two_metrics_are_shown_and_their_mean_counts(tmp_path):
    """Of the paper's MRPC: 0.8848/0.9165; with CoLA's 0.6806 the average is ((0.8848 + 0.9165)/2 + 0.6806)/2."""
    grid = grid_of(tmp_path, methods=["lora", "random"], tasks=["mrpc", "cola"], limits=[{"adapters": 1}], seeds=[0])
    values = {"accuracy": 0.8848, "f1": 0.9165, "matthews_correlation": 0.6806}

    def of(point, **changed):
        metrics = {f"{split}_{name}": v for name, v in {**values, **changed}.items() for split in ("test", "held_out")}
        return record(point, 0.0, 0.0, metrics=metrics)

    mrpc = [row for row in grid.rows if row.task == "mrpc"]
    assert {row.metric for row in mrpc} == {"accuracy/f1"}
    low, high = (
        of(Point(mrpc[0], choice, 0), f1=f1) for choice, f1 in zip(mrpc[0].choices, (0.9165, 0.5), strict=True)
    )
    assert grid.chosen(mrpc[0], by_key([low, high])) == mrpc[0].choices[0]  # by the mean of both
    others = [of(Point(row, row.choices[0], 0)) for row in grid.rows if row.label == "lora" and row.task == "cola"]
    table = make_table(grid, [low, high, *others])
    assert table.header[4:7] == ("mrpc accuracy/f1", "cola matthews_correlation", "average")
    assert [cell.text for cell in table.rows[0][4:7]] == ["88.5/91.6", "68.1", "79.1"]
    one = grid_of(tmp_path, methods=["lora"], tasks=["mrpc"], metric="f1")
    assert {row.metric for row in one.rows} == {"f1"}


def test_files_tune_option_by_option(tmp_path):
    grid_of(
        tmp_path, methods=["lora"], tune={"learning_rate": [1e-3, 2e-3], "warmup_steps": [0, 20]}, learning_rates=...
    )
    (tmp_path / "rates.yaml").write_text("learning_rates: [5.0e-3]")
    (row,) = read_grid([tmp_path / "b.yaml", tmp_path / "rates.yaml"]).rows
    assert [tuple(choice.values()) for choice in row.choices] == [(5e-3, 0), (5e-3, 20)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tune": {"warmup_steps": [1]}, "base": {**BASE, "warmup_steps": 2}}, "base: warmup_steps is decided by tune"),
        ({"tune": {"seed": [1]}}, "tune: seed is decided by seeds"),
        ({"tune": {"learning_rate": [1e-3]}}, "tune: learning_rate is given beside it, too"),
        ({"tune": {"warmup_steps": []}}, "tune.*at least one|tune"),
        ({"tune": {"warmup_steps": [1, 1]}}, "1 once|tune"),
        ({"tune": {"warmup_stepps": [1, 2]}}, "closest: 'warmup_steps'"),
        ({"tune": {"learning_rate": [-1]}, "learning_rates": ...}, "tune: learning_rate"),
        (
            {"methods": {"lora": {"lora_r": 2, "tune": {"lora_r": [1, 2]}}}},
            "lora: tune: lora_r is given beside it, too",
        ),
        ({"tasks": {"sst2": {"lora_r": 2}}, "tune": {"lora_r": [1, 2]}}, "tasks: sst2: lora_r is decided by tune"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(changed, said, tmp_path):
    with pytest.raises(OptionError, match=said) as caught:
        grid_of(tmp_path, **{"methods": ["lora"], **changed})
    assert "\n" not in str(caught.value)


def test_rows_names_those_that_run_and_changes_none_of_them(tmp_path):
    every = grid_of(tmp_path, methods=["lora", "full", "random"], limits=[{"adapters": 1}, {"adapters": 5}])
    few = grid_of(
        tmp_path,
        methods=["lora", "full", "random"],
        limits=[{"adapters": 1}, {"adapters": 5}],
        rows=["random, K = 5", "lora"],
    )
    assert [row.label for row in few.rows] == ["lora", "random, K = 5"]  # in the file's order
    assert {point.key for point in few.tuning} < {point.key for point in every.tuning}  # so that records count for both
    with pytest.raises(OptionError, match=r"'random, K = 5'.*there are lora, full, random, K = 1, random, K = 5"):
        grid_of(
            tmp_path,
            methods=["lora", "full", "random"],
            limits=[{"adapters": 1}, {"adapters": 5}],
            rows=["random, K = 6"],
        )
    with pytest.raises(OptionError, match="reference='full'"):
        grid_of(tmp_path, methods=["lora", "full"], rows=["lora"], reference="full")


def test_one_rate_needs_no_tuning(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3], base={k: v for k, v in BASE.items() if k != "held_out_samples"})
    assert grid.tuning == []
    assert len(grid.tested({})) == len(grid.rows) * 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": ["lora"]}, "'methods'"),
        ({"methods": ["lorra"]}, "'lora'"),
        ({"methods": {"lora": {"lora_rr": 4}}}, "lora_r"),
        ({"methods": {"adalora": {"method_options": ["init=3"]}}}, "init"),
        ({"methods": 3}, "methods=3"),
        ({"tasks": ["rte2"]}, "'rte'"),
        ({"learning_rates": 1e-3}, "learning_rates=0.001"),
        ({"learning_rates": ...}, "learning_rates=None"),
        ({"methods": {"lora": {"learning_rates": []}}}, "lora: learning_rates=[]"),
        ({"tuning_metric": "mcc"}, "tuning_metric='mcc'"),
        ({"seeds": []}, "seeds=[]"),
        ({"reference": "full"}, "reference='full'"),
        ({"base": {}}, "held_out_samples"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_before_anything_runs(tmp_path, changed, named, capsys):
    with pytest.raises(OptionError) as error:
        grid_of(tmp_path, **changed)
    assert named in str(error.value)
    assert main(["bench", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    for path in (tmp_path / "none.yaml", tmp_path / "list.yaml", tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_grid(path)


# -- how a rate is chosen --------------------------------------------------------------------------------------------


def record(point, tested, held_out, **more):
    metrics = {"validation_accuracy": tested, "held_out_accuracy": held_out}
    times = {"selection_seconds": 1.0, "training_seconds": 3.0, "step_ratio": 0.5}
    counts = {"peak_parameters": 2000, "adapter_parameters": 1000}
    return {"options": point.options, "status": "ok", "metrics": metrics, **times, **counts, **more}


def test_a_rate_is_chosen_on_the_rows_held_out_and_on_no_others(tmp_path):
    grid = grid_of(tmp_path)
    row = grid.rows[0]
    low, high = (Point(row, choice, 0) for choice in row.choices)

    def rate(*records):
        return grid.chosen(row, by_key(records))

    assert rate(record(low, 0.1, 0.9), record(high, 0.9, 0.1)) == low.choice  # whatever the test says
    assert rate(record(low, 0.9, 0.1), record(high, 0.1, 0.9)) == high.choice
    assert rate(record(low, 0.5, 0.7), record(high, 0.5, 0.7)) == low.choice
    assert rate(record(low, 0.9, 0.9, status="failed"), record(high, 0.1, 0.1)) == high.choice
    assert rate() is None
    assert grid.tested({}) == []
    # A seed that no rate is tuned with changes nothing.
    other = record(Point(row, grid.rows[0].choices[1], 1), 1.0, 1.0)
    assert rate(record(low, 0.1, 0.9), record(high, 0.9, 0.1), other) == low.choice


def test_a_rate_may_be_chosen_by_the_loss_and_the_table_shows_both(tmp_path):
    rates = [1e-4, 1e-3, 1e-2]
    grid = grid_of(tmp_path, methods=["lora"], learning_rates=rates, tuning_metric="loss", seeds=[0])
    low, middle, high = (Point(grid.rows[0], {"learning_rate": rate}, 0) for rate in rates)

    def found(point, *, accuracy, loss):
        splits = ("validation", "held_out")
        metrics = {f"{split}_{name}": v for split in splits for name, v in (("accuracy", accuracy), ("loss", loss))}
        return record(point, 0, 0, metrics=metrics)

    # The least loss, the largest and the least accuracy are at three rates.
    measured = [(low, 0.7, 0.6), (middle, 0.6, 0.7), (high, 0.8, 0.9)]
    records = [found(point, accuracy=one, loss=two) for point, one, two in measured]
    assert grid.chosen(grid.rows[0], by_key(records)) == low.choice
    by_accuracy = grid_of(tmp_path, methods=["lora"], learning_rates=rates, seeds=[0])
    assert by_accuracy.chosen(by_accuracy.rows[0], by_key(records)) == high.choice
    table = make_table(grid, records)
    assert table.header[4:6] == ("rotten_tomatoes accuracy", "rotten_tomatoes loss")
    assert [cell.text for cell in table.rows[0][4:6]] == ["70.0", "0.600"]


def test_what_is_reported_is_the_mean_over_the_tasks_own_splits(tmp_path):
    grid = grid_of(tmp_path, tasks=["mnli"])
    metrics = {"validation_matched_accuracy": 0.6, "validation_mismatched_accuracy": 0.8, "held_out_accuracy": 0.1}
    assert grid.rows[0].tested({"status": "ok", "metrics": metrics}) == pytest.approx(0.7)


# -- what the table says ---------------------------------------------------------------------------------------------


@pytest.fixture
def synthetic(tmp_path):
    """Three rows of two seeds at one rate: 0.80 and 0.90, 0.70 and 0.72, and one run that failed."""
    grid = grid_of(tmp_path, learning_rates=[1e-3])
    values = {0: (0.80, 0.90), 1: (0.70, 0.72)}
    records = [
        record(Point(grid.rows[i], {"learning_rate": 1e-3}, seed), values[i][seed], 0.0, training_seconds=3.0 + 4 * i)
        for i in values
        for seed in (0, 1)
    ]
    failed = {
        "options": Point(grid.rows[2], {"learning_rate": 1e-3}, 0).options,
        "status": "failed",
        "error": "MemoryError: too much",
    }
    return grid, [*records, failed]


def test_the_table_has_means_errors_places_and_relative_times(synthetic):
    table = make_table(*synthetic)
    assert table.header[:4] == ("method", "rate", "peak", "exported")
    cells = {row[0].text: row for row in table.rows}
    # The standard error of two numbers is half of their distance.
    assert (cells["lora"][4].text, cells["lora"][4].place) == ("85.0 ± 5.0", 1)
    assert (cells["random, K = 1"][4].text, cells["random, K = 1"][4].place) == ("71.0 ± 1.0", 2)
    assert (cells["random, parameters 0.5"][4].text, cells["random, parameters 0.5"][4].place) == ("failed", 0)
    assert [cell.text for cell in cells["random, K = 1"][1:4]] == ["0.001", "2,000", "1,000"]
    assert [cell.text for cell in cells["random, K = 1"][5:]] == ["1.00", "2.00"]  # (1 + 7) / (1 + 3)


def test_a_table_of_what_is_there_says_what_is_missing(synthetic):
    grid, records = synthetic
    assert "80.0 (1 of 2 runs)" in to_markdown(make_table(grid, records[:1]))
    assert {cell.text for cell in make_table(grid, []).rows[0][1:]} == {"–", "0.001"}


def test_several_tasks_have_an_average(tmp_path):
    grid = grid_of(
        tmp_path, tasks=["rotten_tomatoes", "rte"], learning_rates=[1e-3], methods=["lora", "eva"], seeds=[0]
    )
    scores = {("lora", "rotten_tomatoes"): 0.5, ("lora", "rte"): 0.7, ("eva", "rotten_tomatoes"): 0.9}
    rows = {(row.label, row.task): row for row in grid.rows}
    table = make_table(
        grid, [record(Point(rows[key], {"learning_rate": 1e-3}, 0), value, 0.0) for key, value in scores.items()]
    )
    assert [row[6].text for row in table.rows] == ["60.0", "–"]


def test_markdown_and_latex_mark_the_best_and_the_second(synthetic):
    table = make_table(*synthetic)
    lines = to_markdown(table).splitlines()
    assert lines[2].startswith("| lora | 0.001 | 2,000 | 1,000 | **85.0 ± 5.0** |")
    assert "<u>71.0 ± 1.0</u>" in lines[3]
    assert {line.count("|") for line in lines} == {len(table.header) + 1}
    latex = to_latex(table)
    assert r"\textbf{85.0 $\pm$ 5.0}" in latex
    assert r"\underline{71.0 $\pm$ 1.0}" in latex
    assert r"rotten\_tomatoes accuracy" in latex


# -- one run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_record_says_what_the_same_recipe_says(tmp_path):
    """And measuring the step moves neither weights nor metrics."""
    grid = grid_of(tmp_path, methods=["adalora"], learning_rates=[5e-3])
    options = grid.tested({})[0].options
    found = run_job(Job(options, tmp_path / "run", timing_rounds=2, threads=1))
    assert found["status"] == "ok", found
    plain = train(read_recipe(words=[*option_words(options), "--output_dir", str(tmp_path / "plain")]))
    assert found["metrics"] == plain["metrics"]
    assert found["adapter_parameters"] == plain["adapter_parameters"]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    # PEFT's AdaLoRA starts at 1.5 r: A, B and E of 12 components on 36 layers of 384 or 1,536 features.
    sizes = 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    assert found["peak_parameters"] == 12 * (sizes + 36)
    assert found["saved_bytes"] > 0
    assert found["step_ratio"] > 0
    assert json.loads(json.dumps(found)) == found


def test_the_peak_counts_what_any_optimizer_held():
    """The head's 3 numbers, then 3 and 4 more in another optimizer, one of them twice."""
    head, adapter = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))
    peak = Peak()
    with peak.watched():
        torch.optim.SGD([head], lr=0.1).step()
        assert peak.parameters == 3
        torch.optim.AdamW([{"params": [head]}, {"params": [adapter]}]).step()
        torch.optim.SGD([head], lr=0.1).step()
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(100))], lr=0.1).step()
    assert peak.parameters == 7


def test_the_step_is_timed_against_plain_lora_not_dora(tmp_path, minilm):
    from peft import LoraConfig, get_peft_model

    cost = StepCost(tmp_path / "cost.json", 1, Peak())
    cost.on_init_end(None, None, None, model=get_peft_model(minilm, LoraConfig(use_dora=True, task_type="SEQ_CLS")))
    assert not any("magnitude" in name for name, _ in cost._plain.named_parameters())
    assert any("lora_A" in name for name, _ in cost._plain.named_parameters())


def test_a_run_that_fails_is_a_record(tmp_path):
    options = {**BASE, "task": "text_classification", "train_file": str(tmp_path / "none.csv"), "seed": 0}
    found = run_job(Job({**options, "validation_file": "none.csv"}, tmp_path / "run", 0, 1))
    assert found["status"] == "failed"
    assert found["error"].startswith("DataError: there is no file")
    assert found["provenance"]["versions"]["torch"]


# -- nothing stops it for good ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_dies_is_a_record_and_the_others_run_once_each(tmp_path):
    jobs = [Job({"seed": seed}, tmp_path, 0, 1) for seed in range(4)]
    records = list(run_here(jobs, 2, die_at_seed_one))
    assert sorted((r["options"]["seed"], r["status"]) for r in records) == [
        (0, "ok"),
        (1, "failed"),
        (2, "ok"),
        (3, "ok"),
    ]


def test_who_stops_waits_for_nobody(tmp_path):
    others = set(multiprocessing.active_children())
    runs = run_here([Job({"seed": seed}, tmp_path, 0, 1) for seed in (0, 1, 2)], 1, sleep_at_seed_one)
    assert next(runs)["options"]["seed"] == 0
    [worker] = set(multiprocessing.active_children()) - others
    runs.close()
    deadline = time.monotonic() + 60
    while worker.exitcode is None and time.monotonic() < deadline:  # the pool's thread, too, waits for it; one is told
        time.sleep(0.05)
    assert worker.exitcode == -signal.SIGTERM


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The records of a benchmark that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    grid = grid_of(folder, methods=["lora", "random"], limits=..., keep_adapters=True)
    reports = []
    run_grid(grid, where=Where(workers=2), report=reports.append)
    # Two rows: two rates with seed 0, then the better one with seed 1; two at a time.
    counts = [(it.done, it.wanted, len(it.running), it.failed) for it in reports]
    first = [(0, 4, 2, 0), (1, 4, 2, 0), (2, 4, 2, 0), (3, 4, 1, 0), (4, 4, 0, 0)]
    assert counts == [*first, (0, 2, 2, 0), (1, 2, 1, 0), (2, 2, 0, 0)]
    assert reports[0].seconds_left is None
    assert all(it.seconds_left > 0 for it in reports[1:-1])
    assert reports[-1].seconds_left == 0
    return grid


def lasting(records):
    """What of the records must not depend on how they came about."""
    passing = {"selection_seconds", "training_seconds", "run_seconds", "step_ratio", "provenance"}
    return {key_of(r["options"]): {k: v for k, v in r.items() if k not in passing} for r in records}


def left(out):
    """Everything in a benchmark's folder: records as above, bytes of adapters; tables, which tell times, by name."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    records = [json.loads(line) for line in files.pop("records.jsonl").splitlines()]
    assert len(records) == 6
    timed = dict.fromkeys(("table.md", "table.tex", ".weightlora.json"), b"")
    return {**files, **timed, "records": lasting(records)}


def kill(process, _):
    process.kill()


def fill_disk(process, rng):
    """From now on no file of the processes grows beyond a few bytes."""
    limit = rng.choice([0, rng.randrange(6000)])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for one in (process.pid, *map(int, children)):
        with suppress(ProcessLookupError):
            resource.prlimit(one, resource.RLIMIT_FSIZE, (limit, limit))


def started(config, out):
    """The command in a process, and where it answers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightlora.bench.engine", "weightlora.runs.train"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_bench, args=(str(config), str(out), sender))
    process.start()
    sender.close()
    return process, receiver


def struck(rng, config, out, strike, number):
    """Strike the command until ``number`` hits; each start is hit after its first new record at the latest.

    Yields the code, None where it was killed, and what was said, of each start.
    """
    hits = 0
    while True:
        process, receiver = started(config, out)
        if hits < number:
            before, deadline = count(out), time.monotonic() + rng.uniform(2, 12)
            while time.monotonic() < deadline and process.is_alive() and count(out) == before:
                time.sleep(0.01)
            time.sleep(rng.choice([0, rng.uniform(0, 0.5)]))
            strike(process, rng)
        try:
            code, said = receiver.recv()
        except EOFError:
            code, said = None, ""
        process.join()
        hits += code != 0
        yield code, said
        if code == 0:
            return


def count(out):
    """How many records there are."""
    return (out / "records.jsonl").read_bytes().count(b"\n") if (out / "records.jsonl").exists() else 0


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("strike", "code", "number", "what"),
    [(kill, None, cases(5, 30), "SIGKILLs"), (fill_disk, 2, cases(2, 10), "full disks")],
    ids=["killed", "full disk"],
)
def test_struck_at_random_moments_it_ends_with_the_same_records(unbroken, tmp_path, capsys, strike, code, number, what):
    """None is lost and none is there twice."""
    config, rng, hits, ends = unbroken.output_dir.parent / "b.yaml", generator(), 0, 0
    while hits < number:
        out = tmp_path / str(ends)
        for found, said in struck(rng, config, out, strike, min(number - hits, 5)):
            assert found in (code, 0), said
            assert "Traceback" not in said
            if found == 2:
                assert re.search(r"(?m)^weightlora: error: cannot write [^\n]+\n\Z", said), said
            hits += found == code
        assert left(out) == left(unbroken.output_dir)
        ends += 1
    tell(capsys, f"{hits} {what} of bench in {ends} benchmarks; nothing lost, the same records and adapters in the end")


def killed_at(records, config, out, rng):
    """Kill the command soon after it has written so many records."""
    process, _ = started(config, out)
    while count(out) < records and process.is_alive():
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def other_checkout(tmp_path):
    """A clone of the repository, with the sources as they are here."""
    clone = tmp_path / "checkout"
    cloned = subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=False)
    if cloned.returncode != 0:
        pytest.skip("git cannot clone what these tests are in")
    shutil.rmtree(clone / "src")
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return clone


def without_times(grid, records):
    """The table but for its last two columns."""
    return [[(cell.text, cell.place) for cell in row[:-2]] for row in make_table(grid, records).rows]


@pytest.mark.slow
@pytest.mark.fuzz
def test_killed_five_times_continued_on_another_checkout_and_merged_it_is_the_same_table(
    unbroken, tmp_path, other_checkout
):
    config, rng = unbroken.output_dir.parent / "b.yaml", generator()
    here, there, both = (tmp_path / name for name in ("here", "there", "both"))
    killed_at(1, config, here, rng)
    killed_at(2, config, here, rng)
    shutil.copytree(here, there)
    killed_at(3, config, here, rng)  # a run that is done in both folders
    killed_at(3, config, there, rng)
    killed_at(4, config, there, rng)
    assert 3 <= count(here) < 6
    code = "import torch; torch.set_num_threads(1); from weightlora.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", code, "bench", "--config", str(config), "--output_dir", str(there)]
    environment = {**os.environ, "PYTHONPATH": str(other_checkout / "src")}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert count(there) == 6
    assert main(["bench", "merge", str(here), str(there), "--output_dir", str(both)]) == 0
    grid = read_grid(config, both)
    assert lasting(recorded(grid)) == lasting(recorded(unbroken))
    table = make_table(grid, recorded(grid))
    assert table.caption == ""
    assert without_times(grid, recorded(grid)) == without_times(unbroken, recorded(unbroken))
    # A record that is not the same is not overlooked, and neither is one of another revision.
    first, *others = recorded(grid)
    (both / "records.jsonl").write_text("")
    for record in ({**first, "metrics": {"validation_accuracy": -1.0}}, *others):
        append_record(both / "records.jsonl", record)
    assert main(["bench", "merge", str(here), str(both), "--output_dir", str(tmp_path / "none")]) == 2
    other = {**first, "provenance": {**first["provenance"], "git": "0" * 12}}
    assert make_table(grid, [other, *others]).caption.startswith("Records of different sources: git ")


@pytest.mark.slow
def test_a_failed_run_leaves_its_log_and_a_later_success_removes_it(tmp_path, capsys):
    grid = grid_of(
        tmp_path,
        methods={"lora": {"lora_target_modules": ["none_such"]}},
        learning_rates=[1e-3],
        seeds=[0],
    )
    config = ["bench", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(grid.output_dir)]
    assert main(config) == 0
    [found] = recorded(grid)
    log = log_file(grid, found)
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert text.startswith("".join(f"{name}: {value}\n" for name, value in found["options"].items()))
    assert "Traceback" not in (grid.output_dir / "records.jsonl").read_text()
    said = capsys.readouterr().out
    assert f"1/1 rotten_tomatoes, lora, rate 0.001, seed 0: failed: {found['error']}; log: {log}\n" in said
    assert f"1 records in {grid.output_dir}, 1 of them failures\n" in said
    assert main([*config, "--table"]) == 0
    assert f"failed: rotten_tomatoes, lora, rate 0.001, seed 0; log: {log}\n" in capsys.readouterr().out
    _keep_log(log, {**found, "status": "ok"})
    assert not log.exists()


@pytest.mark.slow
def test_ray_gives_the_same_records(unbroken, tmp_path, capsys):
    config = unbroken.output_dir.parent / "b.yaml"
    assert main(["bench", "--config", str(config), "--output_dir", str(tmp_path / "out"), "--ray"]) == 0
    import ray

    ray.shutdown()
    assert lasting(recorded(read_grid(config, tmp_path / "out"))) == lasting(recorded(unbroken))
    assert "6 records" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_recorded_is_not_run_again_but_for_failures_on_demand(unbroken, tmp_path):
    grid = read_grid(unbroken.output_dir.parent / "b.yaml", tmp_path)
    lines = (unbroken.output_dir / "records.jsonl").read_text().splitlines()
    broken = {**json.loads(lines[-1]), "status": "failed", "error": "x"}
    (tmp_path / "records.jsonl").write_text("\n".join([*lines[:-1], json.dumps(broken)]) + "\n")
    reports = []
    run_grid(grid, report=reports.append)
    assert reports == []
    run_grid(grid, retry=True, report=lambda it: reports.append(it.record and it.record["options"]))
    assert reports == [None, broken["options"]]
    assert lasting(recorded(grid)) == lasting(recorded(unbroken))


@pytest.mark.slow
def test_the_command_writes_and_prints_the_table(unbroken, capsys):
    out = unbroken.output_dir
    words = ["bench", "--config", str(out.parent / "b.yaml"), "--output_dir", str(out)]
    assert main([*words, "--table"]) == 0
    shown = capsys.readouterr().out
    markdown = (out / "table.md").read_text()
    tested = [r["metrics"]["validation_accuracy"] for r in recorded(unbroken) if r["options"]["method"] == "lora"]
    assert markdown.count("\n") == 2 + 2
    assert "6 records" in shown
    # Of three runs of LoRA two are at the better rate, one of them the last; both means are possible, no other.
    assert any(f"{100 * statistics.mean([other, tested[-1]]):.1f} ±" in markdown for other in tested[:2])
    assert (out / "table.tex").read_text().startswith(r"\begin{tabular}{lrrrrrr}")


def test_two_cannot_work_on_one_benchmark(tmp_path):
    grid = grid_of(tmp_path)
    with only_writer(grid.output_dir), pytest.raises(OptionError, match="another process works in"):
        run_grid(grid, report=lambda *_: None)


def test_no_workers_are_refused():
    with pytest.raises(OptionError, match="workers=0"):
        Where(workers=0)
