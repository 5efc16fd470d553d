"""Names of the files in an output folder, and the one command that it belongs to; nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from weightlora.errors import OutputError
from weightlora.files import writable_folder
from weightlora.folders import require_own_files, writer_of

CONFIG_FILE, BEFORE_FILE, RESULTS_FILE, BATCH_FILE = "config.yaml", "before.json", "results.json", "batch.json"
HEATMAP_FILE, KNEE_FILE = "heatmap.png", "knee.png"
ADAPTER = "adapter"
#: Of a benchmark.
RECORDS_FILE = "records.jsonl"

#: The commands, as a folder's record and an error name them.
SELECT, TRAIN, ANALYSE = "weightlora select", "weightlora train", "weightlora analyse"
BENCH, DEMO, PAPER = "weightlora bench", "weightlora demo", "weightlora paper"
#: Those that make records of runs.
BENCHES = (BENCH, DEMO, PAPER)


def adapter_in(folder: Path) -> Path:
    """Return the adapter's folder, where ``folder`` is that of a run; any other folder as it is.

    Example:
        >>> (tmp_path / "adapter").mkdir()
        >>> (tmp_path / "config.yaml").touch()
        >>> adapter_in(tmp_path).name, adapter_in(tmp_path / "adapter").name
        ('adapter', 'adapter')
    """
    return folder / ADAPTER if (folder / CONFIG_FILE).is_file() and (folder / ADAPTER).is_dir() else folder


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, the first step's first; other files and folders are left out.

    Example:
        >>> for name in ("checkpoint-10", "checkpoint-2", "checkpoint-best"):
        ...     (tmp_path / name).mkdir()
        >>> [folder.name for folder in checkpoints(tmp_path)]
        ['checkpoint-2', 'checkpoint-10']
    """
    folders = [path for path in output.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(folders, key=lambda folder: step_of(folder) or 0)


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint's name; None where the name is another."""
    match = re.fullmatch(r"checkpoint-([0-9]{1,18})", folder.name)
    return None if match is None else int(match.group(1))


def require_output(folder: Path, writer: str, names: Iterable[str] = (), new: Iterable[str] = ()) -> None:
    """Raise where ``writer`` may not work in ``folder``; call it before long work.

    Args:
        folder: The output folder; other files of the user may be there.
        writer: One of the commands above.
        names: The files that it replaces there.
        new: The files that it writes and never replaces: none of them may be there when it first works there.

    Raises:
        OutputError: Another command wrote there, one of the files was not written by this one, or the folder cannot be
            written.
    """
    from weightlora.trainer.guard import PLAN_FILE  # with the libraries that train

    owner = writer_of(writable_folder(folder))
    owners = _recognised(folder) if owner is None else (owner,)
    if owners and writer not in owners:
        plan = folder / PLAN_FILE
        trainable = writer in (TRAIN, ANALYSE) and plan.exists()
        way_out = f", such as --plan {plan} --output_dir runs/{writer.split()[-1]}" if trainable else ""
        raise OutputError(f"{folder} belongs to {owners[0]}; choose another output_dir{way_out}")
    require_own_files(folder, writer, (*names, *(() if owners else new)))


def _recognised(folder: Path) -> tuple[str, ...]:
    """Who may have written into a folder without a record, as earlier versions left it."""
    if _begins(folder / RECORDS_FILE, b'{"options"'):
        return BENCHES
    finished = (folder / RESULTS_FILE).exists() and (folder / CONFIG_FILE).exists()
    return (TRAIN,) if finished or checkpoints(folder) else ()


def _begins(file: Path, text: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(text)) == text
