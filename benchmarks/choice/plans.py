"""The plans that stages train: packed in results/choice/plans.jsonl.gz, a line each, and known by their hash.

python benchmarks/choice/plans.py                # unpacks them to results/choice/plans/HASH.json, where stages look
python benchmarks/choice/plans.py PLAN.json ...  # packs further ones, and prints where they will be
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from weightlora.files import read_json, write_text

RESULTS = Path(__file__).parents[1] / "results" / "choice"
PACKED = RESULTS / "plans.jsonl.gz"


def main() -> None:
    """Pack the plans that are named, or unpack all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="*", metavar="PLAN.json", help="plans to pack (default: unpack all)")
    asked = parser.parse_args()
    if asked.plans:
        pack(PACKED, [json.dumps(read_json(path)) + "\n" for path in asked.plans])
    for path in unpack(PACKED, RESULTS / "plans"):
        print(path)


def pack(file: Path, plans: Iterable[str]) -> None:
    """Add plans to those of a file, each once.

    Args:
        file: Such as ``PACKED``; it need not exist.
        plans: Each in one line.
    """
    lines = dict.fromkeys([*packed(file), *plans])
    file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def packed(file: Path) -> Sequence[str]:
    """Return the plans of a file, each in one line."""
    return gzip.decompress(file.read_bytes()).decode().splitlines(keepends=True) if file.exists() else []


def unpack(file: Path, folder: Path) -> list[Path]:
    """Write each plan of a file to ``folder`` under its hash; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    for plan in packed(file):
        found.append(folder / f"{hashlib.sha256(plan.encode()).hexdigest()[:12]}.json")
        write_text(found[-1], plan)
    return found


if __name__ == "__main__":
    main()
