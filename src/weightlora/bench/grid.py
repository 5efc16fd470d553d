"""A benchmark: methods × tasks × limits × tuned options × seeds, from one YAML file, as a list of runs.

Each run is a recipe of ``weightlora train``. The learning rate of a row, and what else is tuned, is chosen on training
rows that are held out, with the tuning seeds; its numbers come from the runs of all seeds with what was chosen, on the
task's own evaluation split.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from weightlora.bench._entries import RATE as RATE
from weightlora.bench._entries import limits_text as limits_text
from weightlora.bench._entries import names, read_entries, tuned
from weightlora.bench.records import Record, key_of
from weightlora.errors import OptionError
from weightlora.methods import options_of
from weightlora.plan.limits import LIMITS
from weightlora.runs.recipe import read_recipe
from weightlora.tasks import find_task
from weightlora.tasks.base import HELD_OUT
from weightlora.text import closest

#: The benchmark that ``weightlora demo`` runs.
DEMO = Path(__file__).with_name("demo.yaml")
#: A run is an entry of the records and leaves nothing else behind; all of it can be overridden in ``base``.
QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}


@dataclass(frozen=True)
class Row:
    """A line of the table on one task: a method within limits."""

    label: str
    task: str
    options: Mapping[str, Any]
    """Of ``weightlora train``, but for what is tuned and the seed."""
    metric: str
    """What figures show; of a task that GLUE measures twice ``"accuracy/f1"``."""
    tuning_metric: str
    """What choices are made by."""
    choices: tuple[Mapping[str, Any], ...]
    """Values of the tuned options, the learning rate first: one is chosen."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What tables and differences show: the metric, and what choices are made by."""
        return tuple(dict.fromkeys((self.metric, self.tuning_metric)))

    def lower_is_better(self, metric: str) -> bool:
        """Whether smaller values of a metric are better, as of a loss."""
        return metric == "loss" or find_task(self.task).lower_is_better

    def held_out(self, record: Record) -> float | None:
        """What a choice is made by; None after a failure or where nothing is held out."""
        found = [record.get("metrics", {}).get(f"{HELD_OUT}_{name}") for name in parts_of(self.tuning_metric)]
        return None if record["status"] != "ok" or None in found else statistics.mean(found)

    def tested(self, record: Record, metric: str | None = None) -> float | None:
        """What is reported: the mean of a metric over the task's evaluation splits; None where it was not measured.

        Args:
            record: Of a run of this row.
            metric: One of ``metrics``, or a part of one; None: the first. Of two it is their mean, as in the paper.
        """
        if record["status"] != "ok":
            return None
        means: list[float] = []
        for name in parts_of(metric or self.metric):
            ending = f"_{name}"
            values = [v for k, v in record["metrics"].items() if k.endswith(ending) and k != HELD_OUT + ending]
            means += [statistics.mean(values)] if values else []
        return statistics.mean(means) if len(means) == len(parts_of(metric or self.metric)) else None


@dataclass(frozen=True)
class Point:
    """One run."""

    row: Row
    choice: Mapping[str, Any]
    """One of the row's."""
    seed: int

    @cached_property
    def options(self) -> dict[str, Any]:
        """All that is needed to repeat it with ``weightlora train``."""
        return {**self.row.options, **self.choice, "seed": self.seed}

    @property
    def key(self) -> str:
        """A name that only a run with the same options has."""
        return key_of(self.options)


@dataclass(frozen=True)
class Grid:
    """Everything that a benchmark runs."""

    output_dir: Path
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    reference: str
    """Label of the row that times are relative to."""
    timing_rounds: int
    """Steps a run that are timed, interleaved with those of plain LoRA; 0 leaves the step's time and bytes out."""
    keep_adapters: bool = False
    """Whether the trained adapters stay in ``output_dir/adapters``."""

    @property
    def tuning(self) -> list[Point]:
        """What the choices are made with; empty where there is one."""
        rows = [row for row in self.rows if len(row.choices) > 1]
        return [Point(row, choice, seed) for seed in self.tuning_seeds for row in rows for choice in row.choices]

    @property
    def tuned(self) -> frozenset[str]:
        """Names of the options that some row tunes, the learning rate's included."""
        return frozenset(name for row in self.rows for choice in row.choices for name in choice)

    def tested(self, records: Mapping[str, Record]) -> list[Point]:
        """The runs that the table shows, one seed after the other; rows whose tuning failed have none."""
        pairs = [(row, self.chosen(row, records)) for row in self.rows]
        return [Point(row, choice, seed) for seed in self.seeds for row, choice in pairs if choice is not None]

    def left(self, records: Mapping[str, Record]) -> tuple[list[Point], list[Point]]:
        """The runs without a record: those that choices are made with, and those after them.

        A row whose choice is not made yet has its further seeds with the first: how many there are, and what they
        cost, does not depend on the rate.

        Args:
            records: By the key of their run.
        """
        tuning = unrecorded(self.tuning, records)
        unchosen = [row for row in self.rows if any(point.row is row for point in tuning)]
        further = [seed for seed in self.seeds if seed not in self.tuning_seeds]
        later = [point for point in self.tested(records) if not any(point.row is row for row in unchosen)]
        later += [Point(row, row.choices[0], seed) for seed in further for row in unchosen]
        return tuning, unrecorded(later, records)

    def chosen(self, row: Row, records: Mapping[str, Record]) -> Mapping[str, Any] | None:
        """The choice with the best metric on the rows held out; of equal ones that of the lowest rate.

        NaN and infinity are worse than any number. None: the row is not tuned yet, or all of its tuning failed.

        Args:
            row: A row.
            records: By the key of their run.
        """
        if len(row.choices) == 1:
            return row.choices[0]
        sign = -1 if row.lower_is_better(row.tuning_metric) else 1
        worth: list[tuple[float, Mapping[str, Any]]] = []
        for choice in sorted(row.choices, key=lambda choice: choice[RATE]):
            found = [records.get(Point(row, choice, seed).key) for seed in self.tuning_seeds]
            values = [row.held_out(record) for record in found if record is not None]
            if values and None not in values:
                score = statistics.mean(value for value in values if value is not None)
                worth.append((sign * score if math.isfinite(score) else -math.inf, choice))
        return max(worth, key=lambda each: each[0])[1] if worth else None


def parts_of(metric: str) -> list[str]:
    """Return the metrics of which one is made, such as ``"accuracy/f1"``."""
    return metric.split("/")


def choice_text(choice: Mapping[str, Any]) -> str:
    """Return a choice as tables have it.

    Example:
        >>> choice_text({"learning_rate": 5e-4}), choice_text({"learning_rate": 5e-4, "warmup_steps": 20})
        ('0.0005', '0.0005 warmup_steps=20')
    """
    others = (f" {name}={value}" for name, value in choice.items() if name != RATE)
    return f"{choice[RATE]:g}{''.join(others)}"


def read_grid(
    path: str | Path | Sequence[str | Path],
    output_dir: Path | None = None,
    words: Sequence[str] = (),
    *,
    checked: bool = True,
) -> Grid:
    """Return the benchmark of a YAML file, each of its recipes checked.

    Args:
        path: The file; see docs/guides/methods.md. Of several files the later one wins, option by option in
            ``base``: a model with its rows in one file, what is compared in another.
        output_dir: Wins over the file's.
        words: Options of a recipe from the command line; they win over the file's ``base``, and the four limits,
            ``--learning_rate`` and ``--seed`` over its lists.
        checked: Whether each recipe is checked as it would run here; False counts and draws what only another machine
            can run.

    Raises:
        DataError: The file is not readable.
        OptionError: Something in it is unknown, missing or out of its range.
    """
    paths = [path] if isinstance(path, str | Path) else path
    given = read_entries(paths, words)
    rows = _only(given.get("rows"), tuple(_rows(given)), paths[-1])
    labels = [row.label for row in rows]
    plain = [row.label for row in rows if row.options["method"] == "lora"]
    grid = Grid(
        output_dir=Path(given["output_dir"]) if output_dir is None else output_dir,
        rows=rows,
        seeds=tuple(given["seeds"]),
        tuning_seeds=tuple(given.get("tuning_seeds", given["seeds"][:1])),
        reference=given.get("reference", [*plain, *labels][0]),
        timing_rounds=given.get("timing_rounds", 5),
        keep_adapters=given.get("keep_adapters", False),
    )
    if grid.reference not in labels:
        raise OptionError(
            f"{paths[-1]}: reference={grid.reference!r} is no row; there are {', '.join(dict.fromkeys(labels))}"
        )
    if checked:
        _check_recipes(grid, paths[-1])
    return grid


def _check_recipes(grid: Grid, path: str | Path) -> None:
    """Raise where a run could not be begun: each row is read once, and each value of a tuned option."""
    seen: set[str] = set()
    for row in grid.rows:
        told = {choice_text({**choice, RATE: 0}): choice for choice in row.choices}
        choices = [choice for text, choice in told.items() if text not in seen] or row.choices[:1]
        seen |= told.keys()
        recipes = [read_recipe(Point(row, choice, 0).options) for choice in choices]
        if len(row.choices) > 1 and not recipes[0].task.held_out_samples:
            raise OptionError(
                f"{path}: {len(row.choices)} learning_rates or other choices are compared on rows that are not "
                "reported on; give held_out_samples in base, or one rate"
            )


def _rows(given: Mapping[str, Any]) -> Iterator[Row]:
    """Every method on every task, within each of the limits where it takes some."""
    base, tasks = {**QUIET, **given["base"]}, names(given["tasks"])
    for label, own in names(given["methods"]).items():
        own = {"method": label, **own}
        its = tuned(own)
        own = {name: value for name, value in own.items() if name not in ("tune", "learning_rates")}
        grids = {name: values for name, values in given["tune"].items() if name not in own} | its
        ordered = {RATE: grids.pop(RATE), **grids}
        found = tuple(dict(zip(ordered, values, strict=True)) for values in itertools.product(*ordered.values()))
        choices = _limits(label, own, given.get("limits", [{}]))
        for task, limits in ((task, limits) for limits in choices for task in tasks):
            name = label if len(choices) == 1 else f"{label}, {limits_text(limits)}"
            known = find_task(task)
            measured = (*known.metrics, "loss")
            own_metric = "/".join(known.metrics) if known.kind == "classification" else measured[0]
            metric = given.get("metric", own_metric)
            tuning_metric = given.get("tuning_metric", metric)
            for entry, value in {"metric": metric, "tuning_metric": tuning_metric}.items():
                if value not in measured and value != own_metric:
                    raise OptionError(f"{entry}={value!r} is not measured on {task}; give one of {', '.join(measured)}")
            options = {**base, "task": task, **tasks[task], **own, **limits}
            yield Row(name, task, options, metric, tuning_metric, found)


def _limits(label: str, own: dict[str, Any], given: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The limits of each row of a method, as texts: its own, which are taken out of ``own``, else the file's."""
    known = options_of(own["method"])
    its = {name: own.pop(name) for name in LIMITS if name in own}
    choices = [its] if its else given if known & {*LIMITS} else [{}]
    for name in dict.fromkeys(name for limits in choices for name in limits):
        if name not in known:
            raise OptionError(f"methods: {label}: {own['method']} takes no limit {name}; leave it out, or give others")
    return [{name: str(value) for name, value in limits.items()} for limits in choices]


def _only(wanted: Sequence[str] | None, rows: tuple[Row, ...], path: str | Path) -> tuple[Row, ...]:
    """The rows with these labels, in the file's order; all of them where none is named."""
    if wanted is None:
        return rows
    labels = list(dict.fromkeys(row.label for row in rows))
    for name in wanted:
        if name not in labels:
            raise OptionError(
                f"{path}: rows: {name!r:.80} is no row{closest(name, labels)}; there are {', '.join(labels)}"
            )
    return tuple(row for row in rows if row.label in wanted)


def unrecorded(points: Iterable[Point], records: Mapping[str, Record]) -> list[Point]:
    """Return the points whose key has no record, each once."""
    return list({point.key: point for point in points if point.key not in records}.values())
