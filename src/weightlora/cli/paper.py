"""``weightlora paper``: the tables and figures of the WeightLoRA paper, run and drawn."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightlora.bench.grid import Grid
    from weightlora.bench.records import Record
    from weightlora.paper.results import Results
    from weightlora.paper.study import Study


def add_parser(commands: Any) -> None:
    """Add the command; options of a recipe win over those of the study."""
    parser = add_command(
        commands,
        "paper",
        run,
        help="the paper's tables and figures: run what has no record, then draw",
        description=(
            "Run a table or a figure of the paper and draw it with the paper's values. Without a name, list all of "
            "them with runs, state and cost. The same command resumes. Options of `weightlora train` win over its "
            "own."
        ),
        examples=["weightlora paper", "weightlora paper table7 --workers 2", "weightlora paper figure6 --size full"],
    )
    parser.add_argument(
        "study",
        nargs="?",
        metavar="NAME",
        help=(
            "table1 to table7, figure2 to figure8; table1-rte prints the recipe of that task; peft RESULT.json ... "
            "prints result files of PEFT's own benchmark; default: list them"
        ),
    )
    parser.add_argument(
        "--size",
        default="embedded",
        help="embedded: a small model and data from package wheels; full: the paper's; default: %(default)s",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/paper"),
        help="a folder for each size: records.jsonl, which all studies share, and the drawings; default: %(default)s",
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at once on this machine; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="time a few steps of each kind of run; record nothing")
    parser.add_argument("--draw", action="store_true", help="run nothing; draw what is recorded")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.set_defaults(takes_recipe=True)
    parser.add_argument("--recipes", type=Path, metavar="DIR", help="folder of studies; default: those of the package")


def run(arguments: argparse.Namespace) -> None:
    """List the studies, or run and draw one."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
    from weightlora.errors import OptionError
    from weightlora.paper.study import read_study, recipes_folder, study_names

    console = PlainConsole()
    folder = recipes_folder() if arguments.recipes is None else arguments.recipes
    if arguments.study is None:
        if arguments.rest:
            raise OptionError(f"unrecognized arguments: {' '.join(arguments.rest)} (see weightlora paper --help)")
        with quiet_libraries():
            console.print(_listing(folder, arguments.output_dir))
        return
    if arguments.study == "peft":
        _print_peft_results(arguments.rest, console)
        return
    name, _, task = arguments.study.partition("-")
    if task and arguments.study not in study_names(folder):
        _print_recipe(read_study(name, folder), task, arguments)
        return
    study = read_study(arguments.study, folder)
    kind = study.kind_of(arguments.size)
    if kind == "dot_product":
        _run_dot_product(study, arguments)
    elif kind == "memory":
        _compute(study, arguments, console)
    else:
        _run_grid(study, arguments, console)


def _print_peft_results(words: list[str], console: Console) -> None:
    """Print result files of PEFT's own benchmark as a table."""
    from weightlora.bench.table import to_terminal
    from weightlora.errors import OptionError
    from weightlora.paper.tables import peft_table

    if not words or any(word.startswith("--") for word in words):
        raise OptionError("weightlora paper peft takes result files of PEFT's method_comparison/MetaMathQA alone")
    console.print(to_terminal(peft_table([Path(word) for word in words])))


def _print_recipe(study: Study, task: str, arguments: argparse.Namespace) -> None:
    """Print the recipe of one run of a table, as a file of ``weightlora train``."""
    import yaml

    from weightlora.errors import OptionError
    from weightlora.paper.study import recipe_of

    if arguments.rest:
        raise OptionError(f"{study.name}-{task} is printed as it is; give {arguments.rest[0]} to weightlora train")
    print(yaml.safe_dump(recipe_of(study, task), sort_keys=False), end="")


def _run_grid(study: Study, arguments: argparse.Namespace, console: Console) -> None:
    """Run what has no record, and draw."""
    from weightlora.bench.engine import Where, recorded
    from weightlora.cli._streams import quiet_libraries
    from weightlora.cli.bench import print_cost, run_with_progress
    from weightlora.errors import require_extra
    from weightlora.paper.results import results_of
    from weightlora.runs.files import PAPER

    size, flags = arguments.size, {"where": Where(arguments.workers), "retry": arguments.retry}
    if study.kind != "table":
        require_extra("matplotlib", "report")  # before hours of runs
    if not arguments.draw:
        require_extra("datasets", "bench")  # or each run would be recorded as a failure
    with quiet_libraries():
        grid = study.grid(size, arguments.output_dir / size, arguments.rest, checked=not arguments.draw)
        if arguments.dry_run:
            print_cost(grid, console, **flags)
            return
        _require_own(study, arguments)
        records = recorded(grid) if arguments.draw else run_with_progress(grid, console, **flags, writer=PAPER)
    _show(study, results_of(study, size, grid, records), arguments, console)
    _print_state(grid, console)


def _compute(study: Study, arguments: argparse.Namespace, console: Console) -> None:
    """Compute and draw; there are no runs and no records."""
    from weightlora.cli._streams import quiet_casts, quiet_libraries
    from weightlora.errors import OptionError, require_extra
    from weightlora.paper.results import computed_results

    if arguments.rest:
        raise OptionError(
            f"{study.name} is computed at this size and takes no options of a run; leave out {arguments.rest[0]}"
        )
    require_extra("matplotlib", "report")
    _require_own(study, arguments)
    quiet_casts()
    with quiet_libraries():
        results = computed_results(study, arguments.size)
    _show(study, results, arguments, console)


def _run_dot_product(study: Study, arguments: argparse.Namespace) -> None:
    """Run ``weightlora analyse dot-product`` with the study's recipe."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli.analyse import look
    from weightlora.errors import OptionError
    from weightlora.paper.results import notes_of
    from weightlora.runs.recipe import read_recipe

    for flag in ("dry_run", "draw"):
        if getattr(arguments, flag):
            raise OptionError(f"--{flag} is for studies with records; {study.name} has none: leave it out")
    output = arguments.output_dir / arguments.size / study.name
    look(
        read_recipe(study.setup(arguments.size).recipe, [*arguments.rest, "--output_dir", str(output)]), ("png", "pdf")
    )
    console = PlainConsole()
    for note in notes_of(study, arguments.size):
        console.print(note, highlight=False)


def _require_own(study: Study, arguments: argparse.Namespace) -> None:
    """Raise where a file of the user would be lost."""
    from weightlora.runs.files import PAPER, require_output

    names = [f"{study.name}.{ending}" for ending in ("md", "tex", "png", "pdf")]
    require_output(arguments.output_dir / arguments.size, PAPER, names)


def _show(study: Study, results: Results, arguments: argparse.Namespace, console: Console) -> None:
    """Write table and figure, and print the table."""
    from weightlora.bench.table import parts_that_fit, to_latex, to_markdown, to_terminal
    from weightlora.folders import own_files
    from weightlora.paper.picture import draw
    from weightlora.runs.files import PAPER

    folder = arguments.output_dir / arguments.size
    files = [f"{study.name}.{ending}" for ending in ("md", "tex")]
    with own_files(folder, PAPER) as draft:
        (draft / files[0]).write_text(to_markdown(results.captioned), encoding="utf-8")
        (draft / files[1]).write_text(to_latex(results.captioned), encoding="utf-8")
        if results.picture is not None:
            for ending in ("png", "pdf"):
                files.append(f"{study.name}.{ending}")
                draw(results.picture, draft / files[-1])
    for part in parts_that_fit(results.table, console.width):
        console.print(to_terminal(part))
    for note in results.notes:
        console.print(note, highlight=False)
    console.print(f"wrote {' '.join(str(folder / name) for name in files)}", soft_wrap=True, highlight=False)


def _print_state(grid: Grid, console: Console) -> None:
    """Say how many runs of the study have a record, and which failed."""
    console.print(_state_of(grid).text, highlight=False)


# -- the list ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """Runs of a study."""

    records: tuple[Record, ...]
    left: int

    @property
    def done(self) -> int:
        """Runs with a record."""
        return len(self.records)

    @property
    def failed(self) -> int:
        """Those whose record is a failure."""
        return sum(record["status"] == "failed" for record in self.records)

    @property
    def text(self) -> str:
        """How many runs have a record."""
        failed = f", {self.failed} of them failures" if self.failed else ""
        return f"{self.done} of {self.done + self.left} runs have records{failed}."


def _state_of(grid: Grid) -> _State:
    """Return how many runs of a grid have a record; those of other studies in the folder are not counted."""
    from weightlora.bench.engine import recorded
    from weightlora.bench.records import by_key

    known = by_key(recorded(grid))
    keys = {point.key for point in (*grid.tuning, *grid.tested(known))} & known.keys()
    return _State(tuple(known[key] for key in keys), sum(map(len, grid.left(known))))


def _listing(folder: Path, output_dir: Path) -> Table:
    """Return a line for each study and size."""
    from rich.box import SIMPLE
    from rich.table import Table

    from weightlora.paper.study import read_study, study_names

    caption = (
        "Cost: one run at a time, from the records, or on a CPU core as the study says. Where it is not known, "
        "--dry_run measures it."
    )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=caption)
    for name in ("study", "size", "runs", "recorded", "cost of the rest"):
        table.add_column(name, justify="right" if name in ("runs", "recorded") else "left", no_wrap=True)
    table.add_column("what")
    for name in study_names(folder):
        for line in _lines(read_study(name, folder), output_dir):
            table.add_row(*line)
    return table


def _lines(study: Study, output_dir: Path) -> Iterator[tuple[str, ...]]:
    for number, size in enumerate(study.setups):
        kind = study.kind_of(size)
        if kind == "memory":
            cells = ("–", "–", "computed: a minute")
        elif kind == "dot_product":
            found = (output_dir / size / study.name / "dot_product.json").exists()
            cells = ("1", str(int(found)), "–" if found else _cost(1, study.setup(size).seconds_a_run))
        else:
            cells = _grid_cells(study, size, output_dir)
        yield ("" if number else study.name, size, *cells, "" if number else study.title)


def _grid_cells(study: Study, size: str, output_dir: Path) -> tuple[str, str, str]:
    from weightlora.bench.engine import seconds_left
    from weightlora.text import duration

    grid = study.grid(size, output_dir / size, checked=False)
    state = _state_of(grid)
    measured = seconds_left(grid, state.records, 1)
    cost = _cost(state.left, study.setup(size).seconds_a_run) if measured is None else duration(measured)
    return str(state.done + state.left), str(state.done), cost if state.left else "–"


def _cost(runs: int, seconds: float | None) -> str:
    from weightlora.text import duration

    return "not known" if seconds is None else duration(runs * seconds)
