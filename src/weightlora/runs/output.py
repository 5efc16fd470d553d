"""An output folder belongs to one command: another one does not write there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from weightlora.errors import OutputError
from weightlora.files import writable_folder
from weightlora.folders import require_own_files, writer_of
from weightlora.runs.files import CONFIG_FILE, RECORDS_FILE, RESULTS_FILE, checkpoints
from weightlora.trainer.guard import PLAN_FILE

#: The commands, as a folder's record and an error name them.
SELECT, TRAIN, ANALYSE = "weightlora select", "weightlora train", "weightlora analyse"
BENCH, DEMO, PAPER = "weightlora bench", "weightlora demo", "weightlora paper"
#: Those that make records of runs.
BENCHES = (BENCH, DEMO, PAPER)


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
