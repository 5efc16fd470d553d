"""Records of runs, and ``weightlora bench merge``: those of several machines are one benchmark, or one line says no."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightlora
from weightlora.bench.records import append_record, by_key, provenance, read_records
from weightlora.bench.table import Cell, Table, to_latex, to_markdown
from weightlora.cli import main
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


# -- records of several machines -------------------------------------------------------------------------------------

VERSIONS = {"weightlora": "0.1.0", "torch": "2.13.0"}


def record(seed, accuracy=0.5, seconds=3.0, git="1a2b3c4", **more):
    provenance = {"git": git, "dirty": False, "versions": VERSIONS, "hardware": {"device": f"machine {seed}"}}
    options = {"task": "rte", "method": "lora", "learning_rate": 1e-3, "seed": seed}
    numbers = {"metrics": {"validation_accuracy": accuracy}, "selection_seconds": 0.1, "training_seconds": seconds}
    return {"options": options, "status": "ok", **numbers, "provenance": provenance, **more}


@pytest.fixture
def merge(tmp_path, capsys):
    """Merge folders of these records; returns code, what was said, and the merged records."""

    def run(*contents, words=()):
        folders = [tmp_path / f"machine{i}" for i in range(len(contents))]
        for folder, records in zip(folders, contents, strict=True):
            for one in records:
                append_record(folder / "records.jsonl", one)
        code = main(["bench", "merge", *map(str, folders), "--output_dir", str(tmp_path / "all"), *words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err, read_records(tmp_path / "all" / "records.jsonl")

    return run


def test_each_run_is_there_once(merge):
    one, two, three = record(0), record(1), record(2)
    again = record(1, seconds=9.0, step_ratio=0.5, run_seconds=10.0)  # times differ from machine to machine
    code, said, found = merge([one, two], [again, three])
    assert (code, said.split()[:2]) == (0, ["3", "records"])
    assert found == [one, two, three]


def test_the_last_record_of_a_folder_and_a_success_count(merge):
    failed = {**record(0), "status": "failed", "error": "MemoryError"}
    retried = [failed, record(0)]
    assert merge(retried, [{**record(1), "status": "failed", "error": "x"}], [record(1)])[2] == [record(0), record(1)]


def test_different_results_of_a_run_are_named(merge, tmp_path):
    code, said, found = merge([record(0), record(1)], [record(1, accuracy=0.75)])
    assert (code, found) == (2, [])
    assert said.count("\n") == 1
    [key] = by_key([record(1)])
    for part in (
        key,
        "seed=1",
        "machine0/records.jsonl",
        "machine1/records.jsonl",
        "'validation_accuracy': 0.5",
        "0.75",
    ):
        assert part in said
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"git": "5d6e7f8"}, "git 1a2b3c4 (1), 5d6e7f8 (1)"),
        ({"dirty": True}, "git 1a2b3c4 (1), 1a2b3c4 with changes (1)"),
        ({"versions": {**VERSIONS, "torch": "2.14.0"}}, "torch 2.13.0 (1), 2.14.0 (1)"),
    ],
)
def test_revisions_and_versions_are_not_mixed_silently(merge, changed, named):
    other = deepcopy(record(1))
    other["provenance"].update(changed)
    code, said, found = merge([record(0)], [other])
    assert (code, found) == (2, [])
    assert named in said
    assert "--mixed_revisions" in said
    code, said, found = merge([record(0)], [other], words=["--mixed_revisions"])
    assert (code, found) == (0, [record(0), other])


GOOD = json.dumps(record(0))
#: A line, and what is said of it.
DAMAGED = [
    ("5", "5 is no record"),
    ("[]", "[] is no record"),
    ("null", "None is no record"),
    ('"text"', "'text' is no record"),
    ("not JSON", "it is no JSON"),
    ("{}", "it has no status"),
    (json.dumps({k: v for k, v in record(0).items() if k != "status"}), "it has no status"),
    (json.dumps({**record(0), "status": "fine"}), "status is 'fine'"),
    (json.dumps({**record(0), "status": ["ok"]}), "status is ['ok']"),
    (json.dumps({**record(0), "provenance": "yesterday"}), "provenance is 'yesterday'"),
    (json.dumps({**record(0), "provenance": {"versions": ["torch"]}}), "provenance is"),
    (json.dumps({**record(0), "provenance": {"versions": {"torch": ["2"]}}}), "provenance is"),
    (json.dumps({**record(0), "options": 3}), "options is 3"),
    (json.dumps({**record(0), "options": {}}), "options is {}"),
    (json.dumps({**record(0), "metrics": None}), "metrics is None"),
    (json.dumps({**record(0), "metrics": {"validation_loss": "low"}}), "metrics is"),
    (GOOD.replace("0.5", "1" + "0" * 400), "metrics is"),
    (GOOD.replace("0.5", "1" * 5000), "digits"),
    (json.dumps({**record(0), "training_seconds": None}), "training_seconds is None"),
    (json.dumps({**record(0), "adapter_parameters": float("nan")}), "adapter_parameters is nan"),
    (json.dumps({**record(0), "kept": [["a"]]}), "kept is"),
    (json.dumps({**record(0), "status": "failed"}), "it has no error"),
    (GOOD.replace("0.5", "[" * 500 + "]" * 500), "nested too deeply"),
    (GOOD.replace("0.5", '{"a":' * 500 + "1" + "}" * 500), "nested too deeply"),
    ("[" * 500 + "]" * 500, "nested too deeply"),
    ('{"a":' * 990 + "1" + "}" * 990, "nested too deeply"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
]


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("line", "says"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_named_and_nothing_is_lost(line, says, tmp_path, capsys):
    """In the middle of a file, in front of others and behind them: each command names it and changes nothing."""
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "b.yaml").write_text("{methods: [lora], learning_rates: [1.0e-3]}")
    content = "\n".join([GOOD, line, json.dumps(record(1)), json.dumps(record(2))[:40]])
    (folder / "records.jsonl").write_text(content)
    bench = ["bench", "--config", str(tmp_path / "b.yaml"), "--output_dir", str(folder)]
    merging = ["bench", "merge", str(folder), "--output_dir", str(tmp_path / "all")]
    for words in ([*bench, "--table"], merging, bench, [*bench, "--retry"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{folder / 'records.jsonl'}, line 2: " in said
        assert says in said
        assert "delete it and run the benchmark again" in said
    assert (folder / "records.jsonl").read_text() == content
    assert not (tmp_path / "all").exists()


def test_nan_of_two_machines_is_one_result(merge):
    nan = record(0, accuracy=float("nan"))
    code, _, found = merge([nan], [json.loads(json.dumps(nan))])
    assert (code, json.dumps(found)) == (0, json.dumps([nan]))
    assert merge([record(1, accuracy=float("nan"))], [record(1)])[0] == 2


def test_hardware_may_differ(merge):
    assert record(0)["provenance"]["hardware"] != record(1)["provenance"]["hardware"]
    assert merge([record(0)], [record(1)])[0] == 0


def test_what_cannot_be_merged_is_one_line(merge, tmp_path):
    code, said, _ = merge([record(0)], [])
    assert code == 2
    assert f"there is no {tmp_path / 'machine1' / 'records.jsonl'}" in said
    assert merge([record(0)])[0] == 0
    code, said, found = merge([record(1)])
    assert (code, found) == (2, [record(0)])  # nothing is overwritten
    assert "is there already" in said
    both = ["bench", "merge", str(tmp_path / "all"), str(tmp_path / "machine0"), "--output_dir", str(tmp_path / "all")]
    assert main(both) == 0
    assert len(read_records(tmp_path / "all" / "records.jsonl")) == 2


def test_packed_records_are_merged_and_nothing_is_twice(merge, tmp_path):
    assert merge([record(0)], [record(1)])[0] == 0
    for folder in ("machine1", "all"):
        subprocess.run(["gzip", "-n9", tmp_path / folder / "records.jsonl"], check=True)
    code, said, found = merge([record(2)])
    assert (code, found) == (2, [record(0), record(1)])
    assert "is there already" in said
    again = ["bench", "merge", *(str(tmp_path / name) for name in ("all", "machine1", "machine0"))]
    assert main([*again, "--output_dir", str(tmp_path / "all")]) == 0
    assert read_records(tmp_path / "all" / "records.jsonl") == [record(0), record(1), record(2)]


def test_a_caption_is_below_the_table_and_a_comment_in_latex():
    plain = Table(("method",), ((Cell("lora"),),))
    said = Table(plain.header, plain.rows, "Records of different sources: git a (1), b (2).")
    assert to_markdown(said) == to_markdown(plain) + "\nRecords of different sources: git a (1), b (2).\n"
    assert to_latex(said) == "% Records of different sources: git a (1), b (2).\n" + to_latex(plain)
