"""Standard output on a full disk is one line and exit code 2; a closed pipe is no word at all."""

import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from small_run import adapter, same, words, write_base

from weightlora.cli import main

FULL = Path("/dev/full")
COMMANDS = ("methods", "show", "estimate", "bench", "select", "train")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A finished run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(base, folder)) == 0
    return folder


@pytest.fixture
def command(base, whole, tmp_path):
    """Return the words of a command that prints something."""
    grid = {"base": {"held_out_samples": 2}, "methods": ["lora"], "learning_rates": [1e-3, 1e-2], "seeds": [0]}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(grid))
    plan = str(whole / "plan.json")
    commands = {
        "methods": ["methods"],
        "show": ["show", plan],
        "estimate": ["estimate", plan, "--batch", "2x8"],
        "bench": ["bench", "--table", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(tmp_path / "out")],
        "select": ["select", *words(base, tmp_path / "run")[1:]],
        "train": words(base, tmp_path / "run"),  # the Trainer prints each loss
    }
    return commands.__getitem__


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line(command, name, capsys):
    with FULL.open("w", buffering=1) as full, redirect_stdout(full):  # closing it would fail if anything were left
        assert main(command(name)) == 2
        assert sys.stdout is full
    said = capsys.readouterr().err
    assert said.count("weightlora: error: ") == 1
    assert said.splitlines()[-1].startswith("weightlora: error: cannot print to standard output: No space left")
    assert "Traceback" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_pipe_is_quiet(command, name, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe, redirect_stdout(pipe), pytest.raises(SystemExit) as stop:
        main(command(name))
    assert stop.value.code == 1
    assert "error" not in capsys.readouterr().err


def test_a_training_that_could_not_print_goes_on(whole, command, tmp_path):
    with FULL.open("w", buffering=1) as full, redirect_stdout(full):
        assert main(command("train")) == 2
    assert main(command("train")) == 0
    assert same(adapter(tmp_path / "run"), adapter(whole))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("> /dev/full", 2, "weightlora: error: cannot print to standard output: No space left on device; "),
        ("| true", 1, ""),
        (">&-", 0, ""),
    ],
)
def test_python_adds_nothing_at_its_end(unbuffered, redirected, code, said):
    script = f"true | {sys.executable} -m weightlora --help {redirected}; exit ${{PIPESTATUS[1]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == (said != "")


@pytest.mark.parametrize(("words", "code"), [(["show", "nothing.json"], 2), (["--help"], 0)])
def test_an_error_that_cannot_be_shown_keeps_its_exit_code(words, code, tmp_path):
    with FULL.open("w") as full:
        run = subprocess.run([sys.executable, "-m", "weightlora", *words], cwd=tmp_path, stderr=full, check=False)
    assert run.returncode == code
