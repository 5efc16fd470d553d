"""Killed, or its disk full, at random moments: the same command goes on and ends with the same bytes.

A moment is a time, or the n-th change of the file system: changes come in bursts that a time seldom meets.
tests/bench/test_bench.py does the same with a benchmark.
"""

import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO

import pytest
from fuzz import cases, generator, tell
from small_run import words

from weightlora.cli import main

KILLS = cases(6, 70)
FULL_DISKS = cases(4, 40)
_BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
_ADALORA = {"method": "adalora", "adapters": None, "steps": None, "rule_options": None, "lora_dropout": 0}
#: Runs that take turns: two of them delete checkpoints, and AdaLoRA has state of its own.
VARIANTS = {
    "train": {},
    "select": {},
    "train, the best one": {**_BEST, "save_total_limit": 1},
    "train, adalora": {**_ADALORA, "save_total_limit": 1},
}
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

pytestmark = pytest.mark.fuzz


# -- a process that something happens to -----------------------------------------------------------------------------


def changes(event, arguments, folder):
    """Whether an audit event tells of a change of the file system."""
    if event == "open":
        path, _, flags = arguments
        return isinstance(path, str) and path.startswith(folder) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


def child(command, folder, strike, moment, answer):
    """Run the command; at the change number ``moment``, ``strike`` this process. Answer code, output and changes."""
    tempfile.tempdir = f"{folder}/tmp"
    made, said = [], StringIO()

    def hook(event, arguments):
        if changes(event, arguments, folder):
            made.append(f"{event} {arguments[0]}")
            if len(made) == moment:
                strike(os.getpid())

    sys.addaudithook(hook)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails as it does on a full disk
    with redirect_stderr(said), redirect_stdout(StringIO()):
        code = main(command)
    answer.send((code, said.getvalue(), made))


def kill(process):
    os.kill(process, signal.SIGKILL)


@dataclass(frozen=True)
class FullDisk:
    """From now on no file of the process grows beyond ``limit`` bytes."""

    limit: int

    def __call__(self, process):
        resource.prlimit(process, resource.RLIMIT_FSIZE, (self.limit, self.limit))


@pytest.fixture(scope="module")
def run():
    """Run a command in a process of its own, as ``python -m weightlora`` does; the libraries are loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightlora.runs.train", "weightlora.cli.train", "matplotlib.figure"])

    def start(command, folder, strike=None, *, change=None, seconds=None):
        """Return code, output and the changes made; the code is None where the process was killed."""
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(command, str(folder), strike, change, sender))
        process.start()
        sender.close()
        try:
            if seconds is not None and not receiver.poll(seconds):
                strike(process.pid)
            return receiver.recv()
        except EOFError:
            process.join()
            assert process.exitcode == -signal.SIGKILL
            return None, "", []
        finally:
            process.join()

    return start


# -- what is there in the end ----------------------------------------------------------------------------------------


def content(path):
    """The bytes of a file, without the times that are in some."""
    if path.name not in ("results.json", "trainer_state.json"):
        return path.read_bytes()
    return re.sub(r'"[a-z_]*(_seconds|_runtime|_per_second)": [^,]*', "", path.read_text())


def everything(folder):
    """Each file and folder, hidden ones as well; W&B makes empty folders where it is imported, and is killed, too."""
    paths = [path for path in sorted(folder.rglob("*")) if not re.search(r"wandb-(artifacts|media)$", path.name)]
    return {str(path.relative_to(folder)): content(path) if path.is_file() else None for path in paths}


@dataclass(frozen=True)
class Undisturbed:
    """A command, what it leaves, and how long it takes in seconds and which changes it makes."""

    command: list[str]
    left: dict
    seconds: float
    changes: list[str]


@pytest.fixture(scope="module")
def undisturbed(base, run, tmp_path_factory):
    """The folder of all runs, and a function that returns the undisturbed run of a variant."""
    folder = tmp_path_factory.mktemp("series")

    @cache
    def of(variant):
        verb = variant.partition(",")[0]
        command = [verb, *words(base, folder / "run", **VARIANTS[variant])[1:]]
        fresh(folder)
        begin = time.monotonic()
        code, said, made = run(command, folder)
        assert code == 0, said
        return Undisturbed(command, everything(folder), time.monotonic() - begin, made)

    return folder, of


def fresh(folder):
    shutil.rmtree(folder)
    (folder / "tmp").mkdir(parents=True)


def struck(rng, run, undisturbed, number, make_strike, check):
    """Strike runs until ``number`` were hit, each up to four times, and compare what each leaves at last.

    ``check(code, said)`` looks at each hit.
    """
    folder, of = undisturbed
    counts, turns = Counter(), itertools.cycle(VARIANTS)
    while counts.total() < number:
        variant = next(turns)
        whole = of(variant)
        fresh(folder)
        history, code, hits = [], None, rng.randint(1, 4)
        while code != 0:
            strike, moment = None, {}
            if counts.total() < number and len(history) < hits:
                strike, by_clock = make_strike(), rng.random() < 0.4
                times = {"seconds": rng.uniform(0, whole.seconds)}
                moment = times if by_clock else {"change": rng.randint(1, len(whole.changes))}
            code, said, _ = run(whole.command, folder, strike, **moment)
            history.append(f"{moment}: {code} {said}")
            assert "Traceback" not in said, history
            if code != 0:
                assert strike is not None, history
                check(code, said)
                counts[variant] += 1
        found = everything(folder)
        assert found.keys() == whole.left.keys(), (found.keys() ^ whole.left.keys(), history)
        assert [name for name in found if found[name] != whole.left[name]] == [], history
    return counts


# -- the series ------------------------------------------------------------------------------------------------------


def killed(code, _):
    assert code is None


def refused(code, said):
    assert code == 2, said
    lines = said.splitlines()
    assert [line.startswith("weightlora: error: cannot write") for line in lines].count(True) == 1, said
    assert lines[-1].startswith("weightlora: error: cannot write"), said


@pytest.mark.slow
def test_killed_while_a_checkpoint_takes_the_place_of_another_it_resumes_from_the_new_one(run, undisturbed):
    folder, of = undisturbed
    whole = of("train, adalora")
    written = next(i for i, made in enumerate(whole.changes, 1) if "checkpoint-4" in made)
    deleted = [i for i, made in enumerate(whole.changes, 1) if i > written and made.startswith("os.remove ")]
    older = [i for i in deleted if "checkpoint-2/" in whole.changes[i - 1]]
    for change in generator(2).sample(older[: len(older) // 2], cases(2, 4)):
        fresh(folder)
        assert run(whole.command, folder, kill, change=change)[0] is None
        code, said, made = run(whole.command, folder)
        assert (code, said) == (0, "")
        again = [one for one in made if one.startswith("open ") and "checkpoint-4/trainer_state.json" in one]
        assert not again, "it trained these steps again"
        assert everything(folder) == whole.left


@pytest.mark.slow
def test_killed_at_random_moments(run, undisturbed, capsys):
    counts = struck(generator(), run, undisturbed, KILLS, lambda: kill, killed)
    tell(capsys, f"{counts.total()} SIGKILLs: {dict(counts)}; nothing lost, the same bytes in the end")


@pytest.mark.slow
def test_a_full_disk_at_random_moments(run, undisturbed, capsys):
    rng = generator(1)
    counts = struck(rng, run, undisturbed, FULL_DISKS, lambda: FullDisk(rng.choice([0, rng.randrange(6000)])), refused)
    tell(capsys, f"{counts.total()} full disks: {dict(counts)}; nothing lost, the same bytes in the end")
