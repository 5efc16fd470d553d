"""``weightlora bench merge``: records of several machines are one benchmark, or one line says why not."""

import json
import subprocess
from copy import deepcopy

import pytest

from weightlora.bench.records import append_record, by_key, read_records
from weightlora.bench.table import Cell, Table, to_latex, to_markdown
from weightlora.cli import main

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
