"""Records of several machines → one file: a run that two of them did is one record, if they agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlora.bench.engine import RECORDS_FILE
from weightlora.bench.grid import Record, by_key
from weightlora.bench.records import differing, mixed, packed, read_runs
from weightlora.errors import DataError, OptionError
from weightlora.files import only_writer, write_text
from weightlora.folders import own_files, writer_of
from weightlora.runs.files import BENCH, BENCHES, require_output

#: Entries that two runs with the same options need not share: they tell of the machine, and how a run failed.
_PASSING = {"selection_seconds", "training_seconds", "run_seconds", "step_ratio", "provenance"}


def merge_records(folders: Sequence[Path], *, mixed_revisions: bool = False) -> list[Record]:
    """Return the records of several benchmark folders, each run once.

    Of two records of a run the first folder's is kept, or the successful one where the other failed.

    Args:
        folders: Each has a ``records.jsonl``.
        mixed_revisions: Allow records of different git revisions and versions.

    Raises:
        DataError: A folder has no records or a damaged one, or two of them have different results of the same run.
        OptionError: The records are of different git revisions or versions.
    """
    merged: dict[str, Record] = {}
    origin: dict[str, Path] = {}
    for file in (folder / RECORDS_FILE for folder in folders):
        if not (file.exists() or packed(file).exists()):
            raise DataError(f"there is no {file}; give folders of benchmarks")
        for key, record in by_key(read_runs(file)).items():
            known = merged.get(key)
            if known is not None and record["status"] == known["status"] == "ok":
                _require_equal(key, (origin[key], known), (file, record))
            if known is None or (known["status"] == "failed" and record["status"] == "ok"):
                merged[key], origin[key] = record, file
    found = differing(merged.values())
    if found and not mixed_revisions:
        raise OptionError(
            f"the records are of different sources: {mixed(found)}; run the benchmark with one, or give "
            "--mixed_revisions, and the table will say so"
        )
    return list(merged.values())


def write_merged(records: Sequence[Record], output: Path, folders: Sequence[Path]) -> None:
    """Write ``records.jsonl`` into the folder ``output``.

    Args:
        records: What :func:`merge_records` returned.
        output: The folder; it may be one of those merged.
        folders: Those merged.

    Raises:
        OptionError: ``output`` holds records that were not merged, or another process works there.
        OutputError: ``output`` belongs to a command that makes no records, or the file cannot be written.
    """
    file = output / RECORDS_FILE
    with only_writer(output):
        owner = writer_of(output)
        writer = owner if owner in BENCHES else BENCH
        require_output(output, writer)
        if (file.exists() or packed(file).exists()) and output.resolve() not in [
            folder.resolve() for folder in folders
        ]:
            raise OptionError(f"{file} is there already; choose another --output, or merge that folder too")
        with own_files(output, writer):
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            packed(file).unlink(missing_ok=True)  # all of its records are in the file


def _require_equal(key: str, one: tuple[Path, Record], other: tuple[Path, Record]) -> None:
    """Raise where two records of a run have different results."""
    (first, known), (second, record) = one, other
    names = [n for n in dict.fromkeys((*known, *record)) if n not in _PASSING and _text(known, n) != _text(record, n)]
    if names:
        shown = "; ".join(f"{name} is {_value(known, name)} and {_value(record, name)}" for name in names[:3])
        raise DataError(
            f"run {key} ({_named(record['options'])}) has different results in {first} and {second}: {shown}; remove "
            "the record that is wrong"
        )


def _text(record: Mapping[str, Any], name: str) -> str:
    """The entry as it is compared: NaN is NaN."""
    return json.dumps(record.get(name), sort_keys=True)


def _value(record: Mapping[str, Any], name: str) -> str:
    return f"{record.get(name)!r:.120}"


def _named(options: Mapping[str, Any]) -> str:
    names = ("task", "method", "keep", "learning_rate", "seed")
    return ", ".join(f"{name}={options[name]}" for name in names if name in options)
