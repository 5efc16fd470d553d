"""Records: one JSON line a run, with where it came from; a sweep that was stopped goes on where it was.

A file may be packed: ``gzip -n9 records.jsonl``. Readers take the packed lines first, then those of ``records.jsonl``.
New records go there, so that a packed study goes on as any other. ``gzip -n9c records.jsonl >> records.jsonl.gz`` packs
them, too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from weightlora.errors import DataError, OptionError
from weightlora.files import is_deep, only_writer, write_text
from weightlora.folders import own_files, writer_of
from weightlora.plan.limits import LIMITS
from weightlora.plan.plan import library_versions
from weightlora.runs.files import BENCH, BENCHES, RECORDS_FILE, require_output

Record = dict[str, Any]
#: Of a record whose run was successful: numbers that it must have, and others that it may have.
_SECONDS = ("selection_seconds", "training_seconds")
_NUMBERS = ("run_seconds", "step_ratio", "peak_parameters", "adapter_parameters", "saved_bytes", "sites")
_DEEP = "its values are nested too deeply"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file and of its packed lines; a last line that a stopped run cut off is passed over.

    Raises:
        DataError: A line is no record; its number is named.
    """
    return [record for _, record in _placed(Path(path))]


def read_runs(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a benchmark's runs, each with all that tables read of it.

    Raises:
        DataError: A line is no record of a run; its number is named.
    """
    found: list[dict[str, Any]] = []
    for place, record in _placed(Path(path)):
        fault = _fault(record)
        if fault:
            raise _damaged(place, fault)
        found.append(record)
    return found


def packed(path: Path) -> Path:
    """Return where the packed lines of a file are, if there are any: ``records.jsonl.gz``."""
    return path.with_name(f"{path.name}.gz")


def key_of(options: Mapping[str, Any]) -> str:
    """Return a short name for options, whatever their order.

    Example:
        >>> key_of({"seed": 0, "time": 0.6}) == key_of({"time": 0.6, "seed": 0}) != key_of({"time": 0.6, "seed": 1})
        True
    """
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def by_key(records: Iterable[Record]) -> dict[str, Record]:
    """Return the records by the key of their run; a later one wins, as after ``--retry``."""
    return {key_of(record["options"]): record for record in records}


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append ``record`` as one line, on disk before this returns; one without provenance is given this moment's.

    Raises:
        OSError: The disk is full; nothing of the line stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "provenance" not in record:
        record = {**record, "provenance": provenance()}
    line = json.dumps(record, ensure_ascii=False) + "\n"
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off + line)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def differing(records: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Return what the records do not have in common of git revision and versions: how many have which.

    Example:
        >>> old, new = ({"provenance": {"git": git, "dirty": False}} for git in ("1a2b3c4", "5d6e7f8"))
        >>> differing([old, new, new])
        {'git': Counter({'5d6e7f8': 2, '1a2b3c4': 1})}
    """
    sources = [_source(record.get("provenance") or {}) for record in records]
    names = list(dict.fromkeys(name for source in sources for name in source))
    counts = {name: Counter(source.get(name, "unknown") for source in sources) for name in names}
    return {name: count for name, count in counts.items() if len(count) > 1}


def mixed(differences: Mapping[str, Counter[str]]) -> str:
    """Return what :func:`differing` found as text, such as ``git 5d6e7f8 (2), 1a2b3c4 (1)``."""
    shown: list[str] = []
    for name, count in differences.items():
        values = [f"{value} ({number})" for value, number in count.most_common()]
        shown.append(f"{name} {', '.join(values)}")
    return "; ".join(shown)


def provenance() -> dict[str, Any]:
    """Versions, hardware, time and git revision of this moment."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {**library_versions(), "python": platform.python_version()},
        "hardware": {
            "device": device,
            "instructions": torch.backends.cpu.get_cpu_capability(),  # processors of one name may differ in these
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        # Of one length in every checkout; git's own default depends on how many objects there are.
        "git": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":/src")),
    }


def _placed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its file and line."""
    for file, content in ((packed(path), _unpacked(packed(path))), (path, path.read_bytes() if path.exists() else b"")):
        for number, line in enumerate(content.splitlines(), start=1):
            place = f"{file}, line {number}"
            try:
                record: Any = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if line.startswith(b"{") or not line.strip(b" \0"):  # cut off: by a kill, or when the machine went down
                    continue
                raise _damaged(place, "it is no JSON") from error
            except ValueError as error:  # a number of thousands of digits
                raise _damaged(place, " ".join(str(error).split())) from error
            except RecursionError as error:
                raise _damaged(place, _DEEP) from error
            if is_deep(record):
                raise _damaged(place, _DEEP)
            if not isinstance(record, dict):
                raise _damaged(place, f"{record!r:.40} is no record")
            yield place, cast("dict[str, Any]", record)


def _unpacked(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.exists() else b""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file} is no gzip file ({error}); restore it, or remove it and run the benchmark again"
        ) from error


def _damaged(place: str, fault: str) -> DataError:
    return DataError(f"{place}: {fault}; correct the line, or delete it and run the benchmark again")


def _fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the record of a run, or None."""
    good, options, metrics = record.get("status") == "ok", record.get("options"), record.get("metrics")
    numbers = {name: good and record.get(name) is not None for name in _NUMBERS} | dict.fromkeys(_SECONDS, good)
    fits = {
        "status": record.get("status") in ("ok", "failed"),
        "options": isinstance(options, dict) and {"task", "method", "learning_rate", "seed"} <= {*options},
        "provenance": _is_provenance(record.get("provenance") or {}),
        "error": good or isinstance(record.get("error"), str),
        "metrics": not good or (isinstance(metrics, dict) and all(map(_is_metric, cast("Any", metrics).values()))),
        "kept": all(isinstance(name, str) for name in record.get("kept") or ()),
        **{name: _is_finite(record.get(name)) for name, read in numbers.items() if read},
    }
    for name in (name for name, well in fits.items() if not well):
        return f"{name} is {record[name]!r:.60}, as no run records it" if name in record else f"it has no {name}"
    return None


def _is_provenance(made: Any) -> bool:
    versions: Any = cast("dict[str, Any]", made).get("versions", {}) if isinstance(made, dict) else None
    return isinstance(versions, dict) and all(isinstance(one, str) for one in cast("Any", versions).values())


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_metric(value: Any) -> bool:
    """Whether it is a number; a loss may be infinite or NaN, but a whole number must be one that a float holds."""
    return type(value) is float or _is_finite(value)


def _source(made: Mapping[str, Any]) -> dict[str, str]:
    """Git revision and versions of a record; sources that were changed are another revision."""
    git = {"git": f"{made['git']}{' with changes' if made.get('dirty') else ''}"} if made.get("git") else {}
    return {**git, **made.get("versions", {})}


def _processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    """Output of a git command in the package's checkout; None where there is none."""
    try:
        folder = Path(__file__).parent
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
            raise OptionError(f"{file} is there already; choose another --output_dir, or merge that folder too")
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
    names = ("task", "method", *LIMITS, "learning_rate", "seed")
    return ", ".join(f"{name}={options[name]}" for name in names if name in options)
