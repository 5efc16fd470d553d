"""A study of the paper as data: what it runs at each size, how it is drawn, and the values that the paper has."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import Required, TypedDict

from weightlora.bench.grid import QUIET, RATE, Grid, read_grid
from weightlora.errors import DataError, OptionError
from weightlora.files import read_mapping
from weightlora.text import closest
from weightlora.validation import Number, Positive, Text, first_fault

SIZES = ("embedded", "full")
_CLOSED = ConfigDict(extra="forbid")


@with_config(_CLOSED)
class _SetupEntries(TypedDict, total=False):
    differs: Required[Text]
    configs: list[Text]
    seconds_a_run: Positive
    memory: list[dict[Text, Any]]
    recipe: Text


@with_config(_CLOSED)
class _PublishedEntries(TypedDict, total=False):
    scale: Number
    columns: list[Text]
    rows: dict[Text, list[Number | list[Number]]]
    parameters: dict[Text, Text]
    points: list[dict[Text, Any]]
    statements: list[Text]


@with_config(_CLOSED)
class _StudyEntries(TypedDict, total=False):
    title: Required[Text]
    place: Required[Text]
    kind: Required[Literal["table", "lines", "heat_map", "jaccard", "memory", "dot_product"]]
    axes: dict[Text, Text] | None
    published: _PublishedEntries | None
    embedded: _SetupEntries
    full: _SetupEntries


def recipes_folder() -> Path:
    """Return the folder with the paper's recipes: that of the installed package, or of the checkout."""
    here = Path(__file__)
    installed = here.with_name("recipes")
    return installed if installed.is_dir() else here.parents[3] / "recipes" / "paper"


@dataclass(frozen=True)
class Published:
    """What the paper says."""

    scale: float
    """What its numbers are multiplied with to be per cent."""
    columns: tuple[str, ...]
    """Names of tasks, and ``average``."""
    rows: Mapping[str, tuple[Any, ...]]
    """By the label of a row: a number or a list of two, such as accuracy and F1, for each column."""
    points: tuple[Mapping[str, Any], ...]
    """Numbers of a figure that its text gives: ``series``, ``x`` and ``y``."""
    statements: tuple[str, ...]
    """What the text says of a figure, with its place."""
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    """Its column "# Params", by the label of a row."""

    def text(self, label: str, column: str) -> str:
        """Return a value as a table shows it, in per cent; empty where the paper has none."""
        if label not in self.rows or column not in self.columns:
            return ""
        value = self.rows[label][self.columns.index(column)]
        return "/".join(f"{self.scale * one:.2f}" for one in (value if isinstance(value, list) else [value]))


@dataclass(frozen=True)
class Setup:
    """What is run or computed at one size."""

    differs: str
    """What differs from the paper, in one line."""
    configs: tuple[Path, ...]
    """Files of a benchmark, the later one first; none where nothing is trained."""
    seconds_a_run: float | None
    """Measured on one CPU core; None where nobody has measured it."""
    memory: tuple[Mapping[str, Any], ...]
    """Of a computed figure: the panels, each a model and its batch."""
    recipe: Path | None
    """Of Figure 2: the recipe of ``weightlora analyse dot-product``."""


@dataclass(frozen=True)
class Study:
    """A table or a figure of the paper."""

    name: str
    title: str
    place: str
    """Where it is in the paper."""
    kind: str
    setups: Mapping[str, Setup]
    axes: Mapping[str, str]
    """Of a figure: the options of a run that are ``x``, ``y`` and ``panel``, and their labels."""
    published: Published

    def kind_of(self, size: str) -> str:
        """Return how it is made at a size: memory is computed where no runs are named."""
        return "memory" if self.setup(size).memory else self.kind

    def setup(self, size: str) -> Setup:
        """Return what is run at a size.

        Raises:
            OptionError: The study has no such size.
        """
        if size not in self.setups:
            raise OptionError(f"{self.name} has no size {size!r}; give --size {' or '.join(self.setups)}")
        return self.setups[size]

    def grid(self, size: str, output_dir: Path, words: Sequence[str] = (), *, checked: bool = True) -> Grid:
        """Return the benchmark of a size; all studies share one folder, so that runs in common are run once.

        Args:
            size: ``embedded`` or ``full``.
            output_dir: Where the records are.
            words: Options of a recipe that win over the files.
            checked: See :func:`weightlora.bench.grid.read_grid`.
        """
        return read_grid(self.setup(size).configs, output_dir, words, checked=checked)


def recipe_of(study: Study, task: str) -> dict[str, Any]:
    """Return the recipe of one run at the paper's size, for ``weightlora train``.

    It is WeightLoRA at rank 8 with the most adapters that the table has, and seed 0. Of a grid it takes the middle: of
    two rates in the middle the higher, of two of another option the lower.

    Args:
        study: A table.
        task: One of its columns.

    Raises:
        OptionError: The study trains no WeightLoRA at rank 8, or not on this task.
    """
    rows = study.grid("full", Path(), checked=False).rows if study.setup("full").configs else ()
    rows = [r for r in rows if (r.options["method"], r.options.get("lora_r")) == _OF_RECIPE]
    tasks = list(dict.fromkeys(row.task for row in rows))
    if task not in tasks:
        known = f"there are {', '.join(tasks)}" if tasks else "it has none"
        raise OptionError(f"{study.name} has no recipe of {task!r:.80}{closest(task, tasks)}; {known}")
    row = [row for row in rows if row.task == task][-1]
    own = {name: value for name, value in row.options.items() if name not in (*QUIET, "held_out_samples")}
    middle = {RATE: statistics.median_high}
    tuned = {n: middle.get(n, statistics.median_low)([c[n] for c in row.choices]) for n in row.choices[0]}
    return {**own, **tuned, "adapters": int(own["adapters"]), "seed": 0}


_OF_RECIPE = ("weightlora", 8)


def study_names(folder: Path) -> list[str]:
    """Return the studies of a folder, tables first: its files with a part ``study``."""
    found = (path.stem for path in folder.glob("*.yaml") if re.search(rb"^study:", path.read_bytes(), re.MULTILINE))
    return sorted(found, key=lambda name: (not name.startswith("table"), name))


def read_study(name: str, folder: Path) -> Study:
    """Return a study.

    Args:
        name: Of its file, without the ending.
        folder: With all studies.

    Raises:
        DataError: Its file is not readable.
        OptionError: There is none of this name, or an entry is unknown, missing or has a value it cannot have.
    """
    names = study_names(folder)
    if name not in names:
        known = ", ".join(names) or f"none in {folder}"
        raise OptionError(f"no study {name!r:.80}{closest(name, names)}; there are {known}")
    path = folder / f"{name}.yaml#study"
    given = read_mapping(path)
    _check(path, given)
    published = given.get("published") or {}
    rows = {label: tuple(values) for label, values in (published.get("rows") or {}).items()}
    columns = tuple(published.get("columns", ()))
    for label in published.get("parameters") or {}:
        if label not in rows:
            raise DataError(f"{path}: published: parameters: {label} is no row")
    for label, values in rows.items():
        if len(values) != len(columns):
            raise DataError(f"{path}: published: {label} has {len(values)} values for {len(columns)} columns")
    return Study(
        name=name,
        title=given["title"],
        place=given["place"],
        kind=given["kind"],
        setups={size: _setup(folder, given[size]) for size in SIZES if size in given},
        axes=given.get("axes") or {},
        published=Published(
            published.get("scale", 1),
            columns,
            rows,
            tuple(published.get("points", ())),
            tuple(published.get("statements", ())),
            published.get("parameters") or {},
        ),
    )


def _setup(folder: Path, given: Mapping[str, Any]) -> Setup:
    return Setup(
        differs=given["differs"],
        configs=tuple((folder / name).resolve() for name in given.get("configs", ())),
        seconds_a_run=given.get("seconds_a_run"),
        memory=tuple({**one, "config": (folder / one["config"]).resolve()} for one in given.get("memory", ())),
        recipe=(folder / given["recipe"]).resolve() if "recipe" in given else None,
    )


def _check(path: Path, given: Any) -> None:
    """Raise where an entry of a study is unknown, missing or has a value that it cannot have."""
    fault = first_fault(_StudyEntries, given)
    if fault is None:
        return
    where = ": ".join(map(str, fault.path))
    if fault.allowed:
        raise OptionError(f"{path}: {where}={fault.value!r:.80} is not allowed: give {fault.allowed}")
    if fault.missing:
        raise OptionError(f"{path}: {where} is missing")
    known = [name for kind in (_StudyEntries, _SetupEntries, _PublishedEntries) for name in kind.__annotations__]
    raise OptionError(f"{path}: unknown entry {where!r:.80}{closest(str(fault.path[-1]), known)}")
