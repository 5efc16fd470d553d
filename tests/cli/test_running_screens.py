"""What ``weightlora train``, ``select`` and ``bench`` show: what scoring costs, how far a run is, what comes next."""

import io
import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from small_run import words, write_base
from transformers import AutoModelForSequenceClassification, Trainer, TrainerState, TrainingArguments

from weightlora.bench.dry_run import DryRun, Kind
from weightlora.bench.engine import BenchProgress
from weightlora.cli import main
from weightlora.cli.bench import cost_table, cost_text, progress_table, shown_progress


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def screen(capsys, asked):
    """What a command prints, in one line."""
    assert main(asked) == 0
    return " ".join(capsys.readouterr().out.split())


def select_words(base, output, **changed):
    return ["select", *words(base, output, validation_file=None, **changed)[1:]]


@pytest.mark.usefixtures("without_matplotlib")
def test_pictures_are_left_out_where_they_cannot_be_drawn(base, tmp_path, capsys):
    run, plan = tmp_path / "train", tmp_path / "select"
    assert "no pictures: they need matplotlib; run: pip install 'weightlora[report]'" in screen(
        capsys, words(base, run)
    )
    assert {"results.json", "adapter"} < {path.name for path in run.iterdir()}
    assert "pip install 'weightlora[report]'" in screen(capsys, select_words(base, plan))
    assert {path.name for path in plan.iterdir()} >= {"plan.json"}
    assert not [*run.rglob("*.png"), *plan.rglob("*.png")]


def test_train_ends_with_what_it_cost_and_what_comes_next(base, tmp_path, capsys):
    run, asked = tmp_path / "run", words(base, tmp_path / "run")
    first = screen(capsys, asked)
    results = json.loads((run / "results.json").read_text())
    expected = [
        "learning rate 0.01 scoring takes 2 steps, 33 % of the 6 steps of the training: it pays back in time only "
        "where a step of the plan takes less than 0.67 of LoRA's",
        "selection took",
        f"validation_accuracy {results['metrics']['validation_accuracy']:.4f}",
        f"selection {results['selection_seconds']:.1f} s training {results['training_seconds']:.1f} s in all",
        f"stock PEFT {run / 'adapter'} next: weightlora report {run}",
    ]
    assert [first.count(part) for part in expected] == [1] * len(expected), first
    assert sorted(expected, key=first.index) == expected
    again = screen(capsys, asked)
    assert again.startswith("already done: ")
    assert expected[2] in again
    assert expected[3].removesuffix(" in all") in again
    assert expected[4] in again
    assert "scoring takes" not in again


@pytest.mark.slow
def test_the_commands_that_come_next_run(base, tmp_path, capsys):
    assert main(words(base, tmp_path / "my run")) == 0
    report, check = re.findall(r"^(?:next:)? +weightlora (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert main(shlex.split(report)) == 0
    assert (tmp_path / "my run" / "report.html").exists()
    assert main(shlex.split(check)) in (0, 1)  # 1: a runtime that cannot serve it
    assert main(select_words(base, tmp_path / "my plan")) == 0
    (plan,) = re.findall(r"^next: weightlora train --plan (.*), with", capsys.readouterr().out, re.MULTILINE)
    planned = words(
        base, tmp_path / "planned", "--plan", *shlex.split(plan), adapters=None, steps=None, rule_options=None
    )
    assert main(planned) == 0


def test_the_default_rate_is_on_the_screen(base, tmp_path, capsys):
    assert "learning rate 0.001 (default for adapters) scoring" in screen(
        capsys, select_words(base, tmp_path / "plan", learning_rate=None)
    )


def test_a_rule_that_reads_no_batches_costs_nothing(base, tmp_path, capsys):
    asked = select_words(base, tmp_path / "plan", rule="stratified", steps=None, rule_options=None)
    assert "scoring takes" not in screen(capsys, asked)


def test_scoring_training_and_measuring_without_a_terminal_say_how_far_they_are(base, tmp_path, capsys, monkeypatch):
    """Half a minute is no time here, so each step has its line; at half a minute so short a run has none."""
    quiet = screen(capsys, words(base, tmp_path / "quiet"))
    assert not re.search(r"scoring: \d|step \d+ of|measuring: ", quiet)
    monkeypatch.setattr("weightlora.selection.progress.EVERY", 0.0)
    monkeypatch.setattr("weightlora.selection.progress.ProgressLines.every", 0.0)
    said = screen(capsys, words(base, tmp_path / "run"))
    found = re.findall(r"scoring: \d of 2|step \d of 6|measuring: batch \d of \d", said)
    scoring, training = ["scoring: 1 of 2", "scoring: 2 of 2"], [f"step {i} of 6" for i in range(1, 7)]
    batches = int(found[-1].rpartition(" ")[2])
    assert found == [*scoring, *training, *(f"measuring: batch {i + 1} of {batches}" for i in range(batches))]


def test_each_measurement_begins_at_its_first_batch(base, tmp_path):
    """Some tasks measure by ``evaluate``, some by ``predict``, and each of them more than once."""
    from weightlora.selection.progress import ProgressLines

    said = []
    lines = ProgressLines(said.append)
    lines.every = 0.0
    rows = [{"input_ids": [1, 2, 3], "labels": i % 2} for i in range(4)]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=rows, callbacks=[lines])
    for measure in (trainer.evaluate, partial(trainer.predict, rows)):
        said.clear()
        for _ in range(2):
            measure()
        assert said == ["measuring: batch 1 of 2", "measuring: batch 2 of 2"] * 2


def test_a_training_without_a_terminal_says_a_line_every_half_minute():
    from weightlora.selection.progress import ProgressLines

    clock, said = SimpleNamespace(seconds=0.0), []
    lines = ProgressLines(said.append, now=lambda: clock.seconds)
    state = TrainerState(max_steps=100, global_step=40)  # resumed
    lines.on_train_begin(None, state, None)
    for _ in range(60):  # 8 seconds a step
        clock.seconds += 8
        state.global_step += 1
        if state.global_step == 46:
            lines.on_log(None, state, None, logs={"loss": 0.5})
            lines.on_log(None, state, None, logs={"eval_loss": 0.7})
        lines.on_step_end(None, state, None)
    assert said[:2] == ["step 44 of 100, 7 min left", "step 48 of 100, loss 0.5, 7 min left"]  # 56 and 52 steps of 8 s
    assert len(said) == 60 // 4
    said.clear()
    state.is_world_process_zero = False
    clock.seconds += 99
    lines.on_step_end(None, state, None)
    assert said == []


# -- ``weightlora bench``, before and while it runs ------------------------------------------------------------------


def test_the_live_table_counts_and_names_what_is_running():
    running = tuple({"task": "rte", "method": "lora", "learning_rate": 1e-3, "seed": seed} for seed in range(10))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(progress_table(BenchProgress(None, 12, 40, 1, running, 1000.0), passed=100.0))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert ["12", "10", "1", "18", "15", "min"] in [line.split() for line in lines]
    assert sum("rte, lora" in line for line in lines) == 8
    assert "  and 2 more" in lines
    console.print(progress_table(BenchProgress(None, 0, 40, 0, running[:1], None), passed=100.0))
    assert ["0", "1", "0", "39", "–"] in [line.split() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_live_table_and_a_file_lines_alone(terminal):
    options = {"task": "rte", "method": "lora", "learning_rate": 1e-3, "seed": 0}
    done = {"options": options, "status": "ok", "metrics": {"loss": 1.0}, "selection_seconds": 1, "training_seconds": 2}
    console = Console(width=80, force_terminal=terminal, file=io.StringIO())
    with shown_progress(console, lambda _: Path("log.txt")) as report:
        report(BenchProgress(None, 0, 2, 0, (options,), None))
        report(BenchProgress(done, 1, 2, 0, (options,), 60.0))
        report(BenchProgress({**done, "status": "failed", "error": "E"}, 2, 2, 1, (), 0.0))
    said = console.file.getvalue()
    assert "1/2 rte, lora, rate 0.001, seed 0: loss 1.0000, 3 s\n" in said
    assert "2/2 rte, lora, rate 0.001, seed 0: failed: E; log: log.txt\n" in said
    assert ("time left" in said) == terminal
    assert terminal or said.count("\n") == 2


def test_the_text_adds_up():
    kinds = (Kind("lora", "rte", 3, 80, 600.0, 2_000_000_000), Kind("full", "rte", 1, 0, 0.0, 0, error="OutOfMemory"))
    found = DryRun(kinds, recorded=12, slots=2, seconds=1200.0)
    said = cost_text(found, on_ray=False)
    assert "12 of 16 runs have records" in said
    assert "0.33 hours (20 min)" in said
    assert "Peak memory of 2 runs at once: 4.00 GB" in said
    assert "full, rte failed and is not counted: OutOfMemory" in said
    assert found.steps == 240
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(cost_table(found))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["lora", "3", "240", "10", "min", "30", "min", "2.00", "GB"] in lines
    assert ["full", "1", "failed", "–", "–", "–"] in lines
    assert ["all", "4", "240"] in lines
