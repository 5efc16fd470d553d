"""How often the paper's gates keep each kind of layer (section 2.1), from the records of its studies.

    python benchmarks/kept.py

For each model: kept ÷ expected by chance, the mean over the runs with its standard error. 1 is chance.
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from weightlora.bench.records import read_records

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RECORDS = [RESULTS / name / "records.jsonl" for name in ("table1", "differences", "paper/embedded")]
#: With fewer runs of a model nothing is said of it.
_FEWEST = 10
KINDS = {
    "embedded/minilm": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    "embedded/smollm2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def main() -> None:
    """Print a table for each model."""
    for model, kinds in KINDS.items():
        runs = [
            record
            for path in RECORDS
            for record in read_records(path)
            if chosen(record) and record["options"]["model_name_or_path"] == model
        ]
        if len(runs) < _FEWEST:
            continue
        print(f"\n{model}, {len(runs)} runs\n\n| kind | kept ÷ chance |\n| --- | ---: |")
        for kind in kinds:
            shares = [share(record, kind, kinds) for record in runs]
            print(f"| {kind} | {statistics.mean(shares):.2f} ± {statistics.stdev(shares) / len(shares) ** 0.5:.2f} |")


def chosen(record: dict[str, Any]) -> bool:
    """Whether the run chose at most six of ten sites by the paper's gates."""
    kept = record.get("kept") or ()
    return record["options"]["method"] == "weightlora" and 0 < len(kept) <= 0.6 * record["sites"]


def share(record: dict[str, Any], kind: str, kinds: tuple[str, ...]) -> float:
    """Kept layers of a kind, as a share of what a random choice keeps; all kinds have as many layers."""
    counts = Counter(max((each for each in kinds if name.endswith(each)), key=len) for name in record["kept"])
    return counts[kind] * len(kinds) / len(record["kept"])


if __name__ == "__main__":
    main()
