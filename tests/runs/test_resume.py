"""A run resumes with all of its state or says that it cannot, wherever its folder is, and where the disk was full."""

import json
import multiprocessing
import re
import resource
import shutil
import signal
from contextlib import redirect_stderr
from io import StringIO

import pytest
from safetensors.torch import load_file
from small_run import adapter, interrupted, same, words

from weightlora.cli import main
from weightlora.errors import WeightLoraWarning
from weightlora.files import only_writer
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train

#: What the Trainer begins anew without a word where a checkpoint lacks it.
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0}


def failure(capsys, command):
    capsys.readouterr()
    assert main(command) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


# -- all of its state ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", STATE)
def test_a_checkpoint_without_state_is_left_for_the_one_before(base, whole, tmp_path, name):
    run = interrupted(whole, tmp_path / "run")
    (run / "checkpoint-4" / name).unlink()
    with pytest.warns(WeightLoraWarning, match=rf"checkpoint-4 .* lacks {name}; training resumes from .*checkpoint-2"):
        train(read_recipe(words=words(base, run)[1:]))
    assert same(adapter(run), adapter(whole))


@pytest.mark.parametrize("name", STATE)
def test_a_checkpoint_asked_for_without_state_is_refused(base, whole, tmp_path, capsys, name):
    run = interrupted(whole, tmp_path / "run")
    (run / "checkpoint-4" / name).unlink()
    line = failure(capsys, words(base, run, resume_from_checkpoint=run / "checkpoint-4"))
    assert re.search(rf"checkpoint-4 is no whole checkpoint of a planned run: it lacks {name}", line)


@pytest.mark.slow
def test_a_run_that_saved_weights_alone_does_not_go_on_as_another_training(base, tmp_path, capsys):
    finished = tmp_path / "finished"
    assert main(words(base, finished, save_only_model=True)) == 0
    run = interrupted(finished, tmp_path / "run")
    line = failure(capsys, words(base, run, save_only_model=True))
    assert "lacks optimizer.pt, scheduler.pt, rng_state.pth; no checkpoint of" in line
    assert not (run / "adapter").exists()

    trained = interrupted(finished, tmp_path / "trained", after=6)  # nothing is left to train: weights are enough
    assert main(words(base, trained, save_only_model=True)) == 0
    assert same(adapter(trained), adapter(finished))


def test_a_run_that_was_killed_after_its_last_step_needs_no_optimizer(base, whole, tmp_path):
    run = interrupted(whole, tmp_path / "run", after=6)
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    assert main(words(base, run)) == 0
    assert same(adapter(run), adapter(whole))


# -- wherever its folder is ------------------------------------------------------------------------------------------


def test_a_moved_run_resumes_also_by_a_relative_path(base, whole, tmp_path, monkeypatch):
    run = interrupted(whole, tmp_path / "moved" / "run")
    monkeypatch.chdir(tmp_path)
    assert main(words(base, "moved/run")) == 0
    assert same(adapter(run), adapter(whole))
    assert main(words(base, run)) == 0  # finished, by its full path


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("after", [4, 6])
def test_a_moved_run_ends_with_its_best_checkpoint(base, tmp_path, after):
    """A rate of 1 makes the loss rise: the best checkpoint is an early one, whose stored path is that of before."""
    first = tmp_path / "first"
    assert main(words(base, first, **BEST)) == 0
    best = json.loads((first / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"]
    assert best < 6
    expected, last = (load_file(first / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (best, 6))
    assert same(adapter(first), expected)
    assert not same(last, expected)  # the control
    moved = interrupted(first, tmp_path / "moved", after=after)
    shutil.rmtree(first)
    assert main(words(base, moved, **BEST)) == 0
    assert same(adapter(moved), expected)


def test_other_options_are_refused_also_where_the_plan_is_gone(base, whole, tmp_path, capsys):
    run = interrupted(whole, tmp_path / "run")
    (run / "plan.json").unlink()
    assert "learning_rate: 0.01 there, 0.02 now" in failure(capsys, words(base, run, learning_rate=0.02))
    (run / "config.yaml").unlink()
    assert "its options are not in" in failure(capsys, words(base, run, learning_rate=0.02))


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "select"])
def test_a_second_process_is_refused_before_it_reads_a_row(base, whole, tmp_path, capsys, monkeypatch, command):
    run = interrupted(whole, tmp_path / "run")
    if command == "select":
        shutil.rmtree(run)
        assert main([command, *words(base, run)[1:]]) == 0
    before = (run / "plan.json").read_bytes()
    with only_writer(run):
        monkeypatch.setattr("weightlora.runs._load.load_rows", lambda *_, **__: pytest.fail("rows were loaded"))
        line = failure(capsys, [command, *words(base, run)[1:]])
        assert line == f"weightlora: error: another process works in {run}; wait for it, or choose another output_dir"
    monkeypatch.undo()
    assert (run / "plan.json").read_bytes() == before
    assert main([command, *words(base, run)[1:]]) == 0
    assert not (run / ".lock").exists()


# -- a disk that is full: one line, exit 2, and everything that was written before is whole --------------------------

#: Files are limited to one byte less than one of these, so that the first file of this size or more fails. In the order
#: in which a run writes them.
WRITTEN = (
    "config.yaml",
    "plan.json",
    "checkpoint-2/adapter_model.safetensors",
    "checkpoint-2/optimizer.pt",
    "checkpoint-2/scheduler.pt",
    "checkpoint-2/rng_state.pth",
    "checkpoint-2/trainer_state.json",
    "checkpoint-6/trainer_state.json",
    "adapter/tokenizer.json",
    "results.json",
    "heatmap.png",
)


def limited(command, limit, answer):
    """Run the command where no file grows beyond ``limit`` bytes, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = StringIO()
    with redirect_stderr(said):
        code = main(command)
    answer.send((code, said.getvalue()))


@pytest.fixture(scope="module")
def run_limited():
    """The server has the libraries loaded, so that a start is quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightlora.runs.train", "weightlora.cli.train"])

    def run(command, limit):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=limited, args=(command, limit, sender))
        process.start()
        sender.close()
        try:
            return receiver.recv()
        finally:
            process.join()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(base, whole, run_limited, tmp_path, capsys, name):
    run = tmp_path / "run"
    size = (whole / name).stat().st_size
    code, said = run_limited(words(base, run), size - 1)
    assert code == 2
    lines = [line for line in said.splitlines() if line.startswith("weightlora: error: cannot write")]
    assert len(lines) == 1
    assert said.splitlines()[-1] == lines[0]
    assert "Traceback" not in said
    assert not (run / ".lock").exists()

    capsys.readouterr()
    assert main(words(base, run)) == 0
    assert "warning" not in capsys.readouterr().err  # what was left is whole, or is known to be unfinished
    assert same(adapter(run), adapter(whole))
    shutil.rmtree(run)


@pytest.mark.slow
def test_a_full_disk_in_select(base, whole, run_limited, tmp_path):
    size = (whole / "plan.json").stat().st_size
    code, said = run_limited(["select", *words(base, tmp_path / "run")[1:]], size - 1)
    assert code == 2
    assert said.splitlines()[-1].startswith("weightlora: error: cannot write")
    assert not (tmp_path / "run").exists()
