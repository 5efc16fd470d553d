"""Damaged and foreign files in a run folder: the same adapter in the end, or one line that names the file."""

import json
import shutil
from collections import Counter

import pytest
from fuzz import cases, generator, tell
from small_run import adapter, same, words

from weightlora.cli import main

CASES = cases(12, 200)
MORE = {"gradient_accumulation_steps": 2, "eval_on_start": True, "grow_batch": True}
#: A file of another run is found out where its shapes or sites differ; another run's random state is as good as ours.
TELLING = ("adapter_model.safetensors", "optimizer.pt", "plan.json", "batch.json", "config.yaml")

pytestmark = pytest.mark.filterwarnings("default::weightlora.errors.WeightLoraWarning")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A finished run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(base, folder, **MORE)) == 0
    assert {path.name for path in folder.glob("*.*")} >= {"results.json", "before.json", "batch.json", "config.yaml"}
    return folder


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    """A finished run of another rank and budget."""
    folder = tmp_path_factory.mktemp("other") / "run"
    assert main(words(base, folder, lora_r=4, adapters=3, **{**MORE, "gradient_accumulation_steps": 1})) == 0
    return folder


# -- how a folder is damaged -----------------------------------------------------------------------------------------


def replaced(path, content):
    path.unlink()
    path.write_bytes(content)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def link_instead(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def damage_of(path, rng, run, other):
    """Damage a file and say how."""
    size = path.stat().st_size
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.name != path.name]
    ways = {
        "cut off": lambda: replaced(path, path.read_bytes()[: rng.randrange(size)]),
        "empty": lambda: replaced(path, b""),
        "noise": lambda: replaced(path, rng.randbytes(200)),
        "a list": lambda: replaced(path, b"[]"),
        "an empty mapping": lambda: replaced(path, b"{}"),
        "null": lambda: replaced(path, b"null"),
        "nested": lambda: replaced(path, b"[" * 100_000),
        "a long number": lambda: replaced(path, b'{"metrics": ' + b"9" * 5_000 + b"}"),
        "a malformed date": lambda: replaced(path, b"adapters: 2001-99-99\n"),
        "not a key": lambda: replaced(path, b"1: 2\nadapters: 3\n"),
        "gone": path.unlink,
        "a folder": lambda: folder_instead(path),
        "a link to nowhere": lambda: link_instead(path),
        "another file": lambda: replaced(path, rng.choice(files).read_bytes()),
    }
    if path.name in TELLING and (other / path.relative_to(run)).is_file():
        ways["of another run"] = lambda: replaced(path, (other / path.relative_to(run)).read_bytes())
    way = rng.choice(sorted(ways))
    ways[way]()
    return f"{path.name}: {way}"


def foreign_of(rng, run, other):
    """Add something that no run writes, and say what."""
    checkpoint = run / rng.choice(["checkpoint-2", "checkpoint-4"])
    names = ["checkpoint-best", "checkpoint-", "checkpoint-4-copy", "checkpoint-٣", "checkpoint-99", "checkpoint-1e3"]
    name = rng.choice(names)
    ways = {
        f"folder {name}": lambda: (run / name).mkdir(),
        f"file {name}": lambda: (run / name).write_text("notes"),
        f"copy {name}": lambda: shutil.copytree(checkpoint, run / name),
        "weights of a model": lambda: shutil.copy(
            checkpoint / "adapter_model.safetensors", checkpoint / "model.safetensors"
        ),
        "torch weights": lambda: (checkpoint / "pytorch_model.bin").write_bytes(b"PK"),
        "another adapter": lambda: shutil.copytree(other / "adapter", checkpoint / "second"),
        "another run's checkpoint": lambda: shutil.copytree(other / "checkpoint-6", run / "checkpoint-8"),
    }
    way = rng.choice(sorted(ways))
    ways[way]()
    return way


def adapter_instead(rng, run):
    """Put something else in the place of the adapter's folder, and say what."""
    adapter = run / "adapter"
    moved = run.with_name("moved")
    if adapter.is_dir():
        adapter.rename(moved)
    way = rng.choice(["a file", "a link to nowhere", "a link to the adapter"])
    if way == "a file":
        adapter.write_text("notes")
    else:
        adapter.symlink_to(moved if way == "a link to the adapter" else run / "nowhere")
    return f"adapter: {way}"


def damaged(rng, whole, other, run):
    """Copy a run that is finished, interrupted after its last step, or before it; damage it; say what was done."""
    shutil.copytree(whole, run)
    state = rng.choice(["finished", "trained", "interrupted", "interrupted"])
    if state != "finished":
        (run / "results.json").unlink()
        shutil.rmtree(run / "adapter")
    if state == "interrupted":
        shutil.rmtree(run / "checkpoint-6")
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and "token" not in path.name]
    done = [damage_of(path, rng, run, other) for path in rng.sample(files, rng.choice([1, 1, 2]))]
    if rng.random() < 0.2:
        done.append(foreign_of(rng, run, other))
    if rng.random() < 0.1:
        done.append(adapter_instead(rng, run))
    return f"{state}; {', '.join(done)}"


# -- what becomes of it ----------------------------------------------------------------------------------------------


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"}


def outcome(base, whole, run, capsys):
    """What the command does with the folder; asserts that it is one of the allowed two."""
    before = files_of(run)
    capsys.readouterr()
    code = main(words(base, run, **MORE))
    lines = capsys.readouterr().err.splitlines()
    if code == 0:
        assert same(adapter(run), adapter(whole))
        results = [json.loads((folder / "results.json").read_text()) for folder in (run, whole)]
        assert all(results[0][key] == results[1][key] for key in ("metrics", "kept", "steps", "losses", "before"))
        return "warned and resumed" if any("training resumes from" in line for line in lines) else "as if undamaged"
    assert code == 2
    assert [line.startswith("weightlora: error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("weightlora: error: ")
    assert str(run) in lines[-1], lines[-1]
    if "cannot write" not in lines[-1]:  # a folder where a file is to be written is found when it is written
        assert files_of(run).items() >= before.items()
    return "named"


@pytest.mark.slow
@pytest.mark.fuzz
def test_damaged_run_folders_end_as_whole_ones_or_in_one_line(base, whole, other, tmp_path, capsys):
    found = Counter()
    for case in range(CASES):
        run = tmp_path / str(case) / "run"
        run.parent.mkdir()
        what = damaged(generator(case), whole, other, run)
        try:
            found[outcome(base, whole, run, capsys)] += 1
        except BaseException as error:
            raise AssertionError(f"case {case}: {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(run.parent)
    tell(capsys, f"{CASES} damaged run folders: {dict(found)}; 0 raw tracebacks")
    assert found["named"] > 0
    assert found["warned and resumed"] > 0 or CASES < 12


def test_a_damaged_copy_can_be_told_from_a_whole_one(base, whole, tmp_path, capsys):
    """The control: nothing tells weights of another step from the right ones, and then the comparison fails."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    shutil.copy(run / "checkpoint-4" / "adapter_model.safetensors", run / "checkpoint-6" / "adapter_model.safetensors")
    with pytest.raises(AssertionError):
        outcome(base, whole, run, capsys)
