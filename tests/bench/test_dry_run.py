"""``weightlora bench --dry_run``: it counts the grid's runs and steps, and leaves nothing."""

import dataclasses

import pytest
import yaml
from test_bench import BASE

from weightlora.bench._workers import Job
from weightlora.bench.dry_run import FewSteps, dry_run, sample_job
from weightlora.bench.engine import HERE, Where, makespan, seconds_left
from weightlora.bench.grid import read_grid
from weightlora.bench.records import append_record, by_key
from weightlora.cli import main

FILE = {
    "base": BASE,
    "methods": {"lora": None, "random": None},
    "limits": [{"adapters": 1}, {"parameters": 0.5}],
    "learning_rates": [5e-4, 5e-3],
    "seeds": [0, 1, 2],
    "timing_rounds": 1,
}


def grid_of(folder, **changed):
    path = folder / "b.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changed}, sort_keys=False))
    return read_grid(path, folder / "out")


def record(point, held_out=0.5, seconds=10.0, **more):
    metrics = {"held_out_accuracy": held_out, "validation_accuracy": 0.5}
    times = {"selection_seconds": 1.0, "training_seconds": seconds - 1.0, "run_seconds": seconds}
    return {"options": point.options, "status": "ok", "metrics": metrics, **times, **more}


# -- which runs are left ---------------------------------------------------------------------------------------------


def test_what_is_left_is_what_will_be_run(tmp_path):
    """Three rows: two rates with seed 0, then two more seeds at the better rate."""
    grid, records = grid_of(tmp_path), []
    counts = []
    while True:
        tuning, later = grid.left(by_key(records))
        counts.append((len(tuning), len(later)))
        if not (tuning or later):
            break
        records.append(record((tuning or later)[0], held_out=1 / (1 + len(records))))
    assert counts[:7] == [(6, 6), (5, 6), (4, 6), (3, 6), (2, 6), (1, 6), (0, 6)]
    assert counts[7:] == [(0, n) for n in range(5, -1, -1)]
    assert {r["seed"] for r in (record["options"] for record in records[6:])} == {1, 2}
    # The rates were better where they came first: all later runs are at one rate a row.
    assert {point.key for point in grid.tested(by_key(records))} <= by_key(records).keys()


def test_a_row_whose_tuning_failed_has_no_further_runs(tmp_path):
    grid = grid_of(tmp_path)
    tuning = [record(p, status="failed" if p.row is grid.rows[0] else "ok") for p in grid.tuning]
    assert len(grid.left(by_key(tuning))[1]) == 2 * 2
    assert len(grid.left({})[1]) == 3 * 2


def test_runs_begin_where_one_before_them_ends():
    assert makespan([5, 1, 1, 1], 2) == 5
    assert makespan([1, 1, 1, 5], 2) == 6
    assert makespan([5, 1, 1, 1], 1) == 8
    assert makespan([], 3) == 0


def test_time_left_is_that_of_the_runs_of_the_same_row(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3], seeds=[0, 1])
    first, second, _third = grid.tested({})[:3]
    assert seconds_left(grid, [], 1) is None
    assert seconds_left(grid, [record(first, status="failed")], 1) is None
    known = [record(first, seconds=10.0), record(second, seconds=4.0)]
    # Left: the third row twice, of 7 seconds as the mean of the others, and seed 1 of the first two.
    assert seconds_left(grid, known, 1) == pytest.approx(10 + 4 + 2 * 7)
    # In the order 7, 10, 4, 7: the second worker's 10 ends first after 7 + 4, and takes the last.
    assert seconds_left(grid, known, 2) == pytest.approx(10 + 7)
    old = {k: v for k, v in known[0].items() if k != "run_seconds"} | {"selection_seconds": 1, "training_seconds": 2}
    assert seconds_left(grid, [old], 1) == pytest.approx(5 * 3)


# -- a short run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_is_stopped_after_twelve_steps_and_knows_the_planned_ones(tmp_path):
    """40 rows in batches of 2, three epochs: 60 steps."""
    changed = {**BASE, "max_train_samples": 40, "per_device_train_batch_size": 2, "num_train_epochs": 3}
    grid = grid_of(tmp_path, base={k: v for k, v in changed.items() if k != "max_steps"})
    found = sample_job(Job(grid.tuning[0].options, tmp_path / "unused", timing_rounds=1, threads=1))
    assert found["status"] == "ok", found
    assert found["steps"] == 60
    assert found["seconds"] > 0
    # The embedded model alone has 90 MB of weights.
    assert found["peak_bytes"] > 90e6
    assert not (tmp_path / "unused").exists()


def test_the_mean_step_leaves_out_the_first_two_and_unusual_ones():
    few = FewSteps()
    few._begin, few._ends = 0.0, [10.0, 11.0, 12.0, 14.0]
    assert few.step_seconds == pytest.approx(1.5)
    few._ends = [10.0, 11.0, 12.0, 14.0, 54.0, 56.0]  # of 1, 2, 40 and 2 seconds; the median is 2
    assert few.step_seconds == pytest.approx(5 / 3)
    few._ends = [10.0]
    assert few.step_seconds == 10.0


# -- the whole dry run -----------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path):
    """A grid of one kind that runs, and one that fails: the model has no such layers."""
    return grid_of(
        tmp_path,
        methods={"lora": None, "broken": {"method": "lora", "lora_target_modules": ["none_such"]}},
        seeds=[0, 1],
        learning_rates=[1e-3],
    )


@pytest.mark.slow
def test_it_counts_what_the_grid_has_and_leaves_no_records(few):
    grid, told = few, []
    [done] = [p for p in grid.tested({}) if p.row.label == "lora" and p.seed == 0]
    append_record(grid.output_dir / "records.jsonl", record(done))
    before = {path: path.read_bytes() for path in grid.output_dir.rglob("*")}
    found = dry_run(grid, where=Where(workers=2), report=lambda point, *counts: told.append((point.row.label, *counts)))
    assert {path: path.read_bytes() for path in grid.output_dir.rglob("*")} == before
    assert (found.recorded, found.runs, found.slots) == (1, 3, 2)
    assert sorted(label for label, *_ in told) == ["broken", "lora"]
    assert [counts for _, *counts in told] == [[1, 2], [2, 2]]
    good, bad = sorted(found.kinds, key=lambda kind: bool(kind.error))
    assert (good.label, good.runs, good.steps) == ("lora", 1, BASE["max_steps"])
    assert (bad.label, bad.runs, bad.steps, bad.seconds) == ("broken", 2, 0, 0.0)
    assert "none_such" in bad.error
    # One run and the start of its process are what is left.
    assert found.seconds > good.seconds > 0
    assert found.steps == BASE["max_steps"]


def test_where_nothing_is_left_nothing_is_timed(few, capsys):
    for point in few.tested({}):
        append_record(few.output_dir / "records.jsonl", record(point))
    config = str(few.output_dir.parent / "b.yaml")
    assert main(["bench", "--config", config, "--output_dir", str(few.output_dir), "--dry_run"]) == 0
    assert capsys.readouterr().out == "4 of 4 runs have records.\n"


# -- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _cluster():
    """A cluster of this machine that says that it has one GPU."""
    import ray

    ray.init(num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_runs_that_fit_at_once_on_ray(few, capsys):
    """Three CPUs and a GPU: two runs of half a GPU, one of a whole one, three without."""
    slots = {gpus: Where(1, on_ray=True, gpus_per_run=gpus).slots() for gpus in (0, 0.2, 0.5, 0.6, 1)}
    assert slots == {0: 3, 0.2: 3, 0.5: 2, 0.6: 1, 1: 1}
    config = ["bench", "--config", str(few.output_dir.parent / "b.yaml"), "--output_dir", str(few.output_dir)]
    assert main([*config, "--ray", "--gpus_per_run", "2", "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert "at most 3 and 1" in said
    assert "--gpus_per_run" in said
    assert main([*config, "--ray", "--gpus_per_run", "0.5", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "0 of 4 runs have records" in said
    assert "on the Ray cluster, 2 runs at once" in said
    assert not few.output_dir.exists()


def test_defaults_are_one_run_at_a_time_on_this_machine():
    assert dataclasses.asdict(HERE) == {"workers": 1, "on_ray": False, "gpus_per_run": 0}
    assert HERE.slots() == 1
