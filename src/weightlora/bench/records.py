"""Records: one JSON line a run, with where it came from; a sweep that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from weightlora.plan.provenance import library_versions


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file; a last line that a stopped run cut off is passed over."""
    path = Path(path)
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # cut off: no JSON, or not even text
            continue
    return records


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
