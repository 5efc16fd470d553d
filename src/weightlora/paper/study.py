"""A study of the paper as data: what it runs at each size, how it is drawn, and the values that the paper has."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from weightlora.bench.grid import QUIET, Grid, read_grid
from weightlora.errors import DataError, OptionError
from weightlora.files import read_mapping
from weightlora.text import closest

SIZES = ("embedded", "full")
KINDS = ("table", "lines", "heat_map", "jaccard", "memory", "dot_product")
_FILE = "study.yaml"


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

    It is WeightLoRA at rank 8 with the most adapters that the table has, at the middle one of its rates, and seed 0.

    Args:
        study: A table.
        task: One of its columns.

    Raises:
        OptionError: The study trains no WeightLoRA at rank 8, or not on this task.
    """
    rows = study.grid("full", Path(), checked=False).rows if study.setup("full").configs else ()
    rows = [r for r in rows if (r.options["method"], r.options["rule"], r.options.get("lora_r")) == _OF_RECIPE]
    tasks = list(dict.fromkeys(row.task for row in rows))
    if task not in tasks:
        known = f"there are {', '.join(tasks)}" if tasks else "it has none"
        raise OptionError(f"{study.name} has no recipe of {task!r:.80}{closest(task, tasks)}; {known}")
    row = [row for row in rows if row.task == task][-1]
    own = {name: value for name, value in row.options.items() if name not in (*QUIET, "held_out_samples")}
    return {**own, "keep": int(own["keep"]), "learning_rate": statistics.median(row.learning_rates), "seed": 0}


_OF_RECIPE = ("weightlora", "paper", 8)


def study_names(folder: Path) -> list[str]:
    """Return the studies of a folder, tables first."""
    found = (path.parent.name for path in folder.glob(f"*/{_FILE}"))
    return sorted(found, key=lambda name: (not name.startswith("table"), name))


def read_study(name: str, folder: Path) -> Study:
    """Return a study.

    Args:
        name: Of its folder.
        folder: With all studies.

    Raises:
        DataError: Its file is not readable.
        OptionError: There is none of this name, or an entry is unknown, missing or has a value it cannot have.
    """
    names = study_names(folder)
    if name not in names:
        known = ", ".join(names) or f"none in {folder}"
        raise OptionError(f"no study {name!r:.80}{closest(name, names)}; there are {known}")
    path = folder / name / _FILE
    given = read_mapping(path)
    _require_entries(path, given, _ENTRIES, needed=("title", "place", "kind"))
    if given["kind"] not in KINDS:
        raise OptionError(f"{path}: kind={given['kind']!r:.80} is not allowed: give one of {', '.join(KINDS)}")
    setups = {size: _setup(path, given[size]) for size in SIZES if size in given}
    return Study(
        name=name,
        title=str(given["title"]),
        place=str(given["place"]),
        kind=given["kind"],
        setups=setups,
        axes=given.get("axes") or {},
        published=_published(path, given.get("published") or {}),
    )


_ENTRIES = ("title", "place", "kind", "axes", "published", *SIZES)


def _setup(path: Path, given: Any) -> Setup:
    _require_entries(path, given, ("differs", "configs", "seconds_a_run", "memory", "recipe"), needed=("differs",))
    recipe = given.get("recipe")
    configs = tuple((path.parent / name).resolve() for name in given.get("configs", ()))
    return Setup(
        differs=str(given["differs"]),
        configs=configs,
        seconds_a_run=given.get("seconds_a_run"),
        memory=tuple({**one, "config": (path.parent / one["config"]).resolve()} for one in given.get("memory", ())),
        recipe=None if recipe is None else (path.parent / recipe).resolve(),
    )


def _published(path: Path, given: Any) -> Published:
    _require_entries(path, given, ("scale", "columns", "rows", "points", "statements"), needed=())
    columns = tuple(given.get("columns", ()))
    rows = {label: tuple(values) for label, values in (given.get("rows") or {}).items()}
    for label, values in rows.items():
        if len(values) != len(columns):
            raise DataError(f"{path}: published: {label} has {len(values)} values for {len(columns)} columns")
    points, statements = (tuple(given.get(name, ())) for name in ("points", "statements"))
    return Published(given.get("scale", 1), columns, rows, points, statements)


def _require_entries(path: Path, given: Any, known: Sequence[str], needed: Sequence[str]) -> None:
    """Raise unless ``given`` is a mapping with these entries."""
    if not isinstance(given, dict):
        raise DataError(f"{path} holds a {type(given).__name__} where entries are expected: {', '.join(known)}")
    for key in cast("dict[str, Any]", given):
        if key not in known:
            raise OptionError(f"{path}: unknown entry {key!r:.80}{closest(str(key), known)}")
    for key in needed:
        if key not in given:
            raise OptionError(f"{path}: {key} is missing")
