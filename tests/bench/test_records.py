import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightlora
from weightlora.bench.records import append_record, provenance, read_records
from weightlora.errors import DataError
from weightlora.files import read_json, write_json

RECORD = {"method": "weightlora", "accuracy": 0.75, "note": "ω"}


def stored(path: Path) -> list[dict]:
    """The records as they were given, without their provenance."""
    return [{key: value for key, value in record.items() if key != "provenance"} for record in read_records(path)]


def test_records_read_back_in_the_order_they_were_appended(tmp_path):
    path = tmp_path / "made on the way" / "records.jsonl"
    assert read_records(path) == []
    for seed in range(3):
        append_record(path, {**RECORD, "seed": seed})
    assert stored(path) == [{**RECORD, "seed": seed} for seed in range(3)]
    assert len(path.read_text(encoding="utf-8").split("\n")) == 3 + 1


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=20)
@given(st.sampled_from(["plain", "ω", "two\nlines", "\r", "\u2028", "\x85", '"', "\\"]))
def test_any_text_reads_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    append_record(path, {"text": text})
    assert stored(path) == [{"text": text}]


ASCII_CUTS = (-1, -2, -10, -100)


@pytest.mark.parametrize("end", ASCII_CUTS)
def test_a_last_line_that_was_cut_off_is_passed_over(tmp_path, end):
    path = tmp_path / "records.jsonl"
    append_record(path, {"seed": 0})
    append_record(path, {"seed": 1})
    path.write_bytes(path.read_bytes()[:end])
    # Without its newline alone the line is still whole
    assert stored(path) == ([{"seed": 0}, {"seed": 1}] if end == -1 else [{"seed": 0}])


@pytest.mark.parametrize("end", ASCII_CUTS[1:])
def test_a_sweep_goes_on_after_a_line_that_was_cut_off(tmp_path, end):
    path = tmp_path / "records.jsonl"
    append_record(path, {"seed": 0})
    path.write_bytes(path.read_bytes()[:end])
    append_record(path, {"seed": 1})
    assert stored(path) == [{"seed": 1}]


def test_a_line_that_was_cut_off_inside_a_letter_is_passed_over(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"seed": 0})
    with path.open("ab") as file:
        file.write('{"note": "ω'.encode()[:-1])
    assert stored(path) == [{"seed": 0}]


def test_what_a_crash_left_is_passed_over(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"seed": 0})
    path.write_bytes(path.read_bytes() + b'{"seed": 1, "opt' + b"\n" + b"\0" * 40 + b"\n\n")
    append_record(path, {"seed": 2})
    assert stored(path) == [{"seed": 0}, {"seed": 2}]


def test_packed_records_come_first_and_more_are_packed_behind_them(tmp_path):
    """As ``gzip`` packs them; what is written anew is beside the packed lines."""
    path = tmp_path / "records.jsonl"
    for seed in range(2):
        append_record(path, {"seed": seed})
        subprocess.run(f"gzip -n9c {path} >> {path}.gz && rm {path}", shell=True, check=True)
    append_record(path, {"seed": 2})
    assert stored(path) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    (tmp_path / "records.jsonl.gz").write_bytes((tmp_path / "records.jsonl.gz").read_bytes()[:-5])
    with pytest.raises(DataError, match=r"records.jsonl.gz is no gzip file"):
        read_records(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_is_no_number_reads_back(tmp_path, value):
    append_record(tmp_path / "records.jsonl", {"loss": value})
    write_json(tmp_path / "results.json", {"loss": value})
    for found in (stored(tmp_path / "records.jsonl")[0], read_json(tmp_path / "results.json")):
        assert repr(found) == repr({"loss": value})


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_line_that_the_disk_has_no_room_for_leaves_nothing(tmp_path, room):
    path = tmp_path / "records.jsonl"
    append_record(path, {"seed": 0})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_record(path, {"seed": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_provenance_tells_versions_hardware_time_and_revision():
    here = provenance()
    assert here["versions"]["python"] == platform.python_version()
    for name in ("torch", "transformers", "peft", "weightlora"):
        assert here["versions"][name] == version(name)
    assert here["hardware"]["cores"] == os.cpu_count()
    assert here["hardware"]["threads"] == torch.get_num_threads()
    assert here["hardware"]["device"]
    assert f"CPU capability usage: {here['hardware']['instructions']}" in torch.__config__.show()
    assert here["time"].endswith("+00:00"), "one clock for all machines"


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_provenance_has_the_revision_of_the_source():
    assert provenance()["git"] == git(Path(weightlora.__file__).parent, "rev-parse", "HEAD")[:12]


DIRTY = """
from pathlib import Path
from weightlora.bench.records import provenance
print(provenance()["dirty"])
Path("notes.txt").write_text("beside the source")
print(provenance()["dirty"])
with open("src/weightlora/errors.py", "a") as file:
    file.write("# changed")
print(provenance()["dirty"])
"""


@pytest.mark.slow
def test_provenance_tells_a_changed_source_from_a_committed_one(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(weightlora.__file__).parent, tmp_path / "src" / "weightlora", ignore=ignored)
    (tmp_path / ".gitignore").write_text("__pycache__")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIRTY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False", "True"]


def test_a_machine_without_git_still_writes_records(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    append_record(tmp_path / "records.jsonl", RECORD)
    (record,) = read_records(tmp_path / "records.jsonl")
    assert record["provenance"]["git"] is None
    assert record["method"] == "weightlora"
