"""A disk that is full: one line, exit 2, and everything that was written before is whole."""

import multiprocessing
import resource
import shutil
import signal
from contextlib import redirect_stderr
from io import StringIO

import pytest
from small_run import adapter, same, words

from weightlora.cli import main

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
