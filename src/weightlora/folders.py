"""Folders of results, written whole or not at all; nothing that somebody else wrote there is replaced or removed.

A folder's record, ``.weightlora.json``, names what wrote there, and the SHA-256 of its files. A file is replaced or
removed only by the same writer, and only where it is still as that writer left it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightlora.errors import OutputError
from weightlora.files import DRAFT, cannot_write, scratch_folder, write_json

RECORD_FILE = ".weightlora.json"


@dataclass(frozen=True)
class _Record:
    writer: str
    files: frozenset[tuple[str, str]]
    """Path in the folder, and SHA-256."""


def writer_of(folder: Path) -> str | None:
    """Return what the folder's record names; None where there is no record."""
    record = _read(folder)
    return None if record is None else record.writer


@contextmanager
def whole_folder(path: str | Path, writer: str) -> Generator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    A folder that is there is replaced, if all of it was written here by the same writer. Where ``path`` is a symbolic
    link, this is about the folder that it points to.

    Args:
        path: The folder; it is created if missing.
        writer: Who writes, as a user knows it, such as ``weightlora export``.

    Raises:
        OutputError: The folder holds something else, cannot be written, is a file, or the disk is full.

    Example:
        >>> with whole_folder(tmp_path / "served", "weightlora export") as draft:
        ...     _ = (draft / "a.txt").write_text("all or nothing")
        >>> sorted(path.name for path in (tmp_path / "served").iterdir())
        ['.weightlora.json', 'a.txt']
    """
    require_replaceable(path, writer)
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target.parent) as scratch:
            draft, old = scratch / "new", scratch / "old"
            draft.mkdir()
            yield draft
            _write(draft, _Record(writer, _digests(draft)))
            require_replaceable(path, writer)  # somebody may have written there meanwhile
            try:
                if target.exists():
                    target.replace(old)
                draft.replace(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.replace(target)
                raise
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(Path(path), error) from error


def replace_folder(source: Path, target: Path, writer: str) -> None:
    """Move the folder ``source`` to ``target``, which is replaced as :func:`whole_folder` does.

    Raises:
        OutputError: See there.
    """
    with whole_folder(target, writer) as draft:
        draft.rmdir()
        shutil.move(source, draft)


@contextmanager
def own_files(folder: Path, writer: str) -> Generator[Path]:
    """Yield a temporary folder whose files move into ``folder`` when the block ends, beside what else is there.

    From then on the folder belongs to ``writer``.

    Raises:
        OutputError: One of the files would replace another's, or cannot be written; or the folder belongs to another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder) as draft:
            yield draft
            new = _digests(draft)
            names = {name for name, _ in new}
            require_own_files(folder, writer, names)
            record = _read(folder) or _Record(writer, frozenset())
            _write(folder, _Record(writer, record.files | new))  # whoever is killed from here on knows both
            for name in sorted(names):
                (draft / name).replace(folder / name)
            kept = {(name, digest) for name, digest in record.files if name not in names}
            _write(folder, _Record(writer, new | kept))
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(folder, error) from error


def remove_own_file(file: Path, writer: str) -> None:
    """Remove a file that ``writer`` wrote with :func:`own_files`; one that somebody changed stays."""
    if _is_own(file.parent, file.name, _own(file.parent, writer)):
        file.unlink()


def require_replaceable(path: str | Path, writer: str) -> None:
    """Raise where the folder ``path`` holds anything that ``writer`` did not write; call it before long work.

    Raises:
        OutputError: With the first file that would be lost.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(
                f"cannot write the folder {path}: a file is there; move it, or choose another output folder"
            )
        lost = _first_foreign(path, _own(path, writer))
        here = path.is_dir() and Path.cwd().is_relative_to(os.path.realpath(path))
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    if lost is not None:
        raise OutputError(
            f"{path} holds {lost}, which {writer} did not write, or which was changed since; choose a new folder"
        )
    if here:
        raise OutputError(f"cannot replace {path}, in which this process works; choose a new folder")


def require_own_files(folder: Path, writer: str, names: Iterable[str]) -> None:
    """Raise where ``writer`` cannot write the files ``names`` into ``folder``; call it before long work.

    Raises:
        OutputError: The folder belongs to another, or a file of such a name is not as ``writer`` left it.
    """
    owner = writer_of(folder)
    if owner not in (None, writer):
        raise OutputError(f"{folder} belongs to {owner}; choose another output folder")
    own = _own(folder, writer)
    for name in sorted(names):
        if os.path.lexists(folder / name) and not _is_own(folder, name, own):
            raise OutputError(
                f"{folder / name} was not written by {writer}, or was changed since; move it, or choose another output "
                "folder"
            )


def _first_foreign(folder: Path, own: frozenset[tuple[str, str]]) -> str | None:
    """The first file in a folder, or in a folder below, that is not in ``own``; an empty folder counts as a file.

    Drafts that a killed process left are not counted.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    names = sorted(path.as_posix() for path in paths if not path.parts[0].startswith(DRAFT))
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            known = any(path.iterdir())  # what is in it has names of its own
        else:
            known = (name == RECORD_FILE and len(names) > 1) or _is_own(folder, name, own)
        if not known:
            return name
    return None


def _own(folder: Path, writer: str) -> frozenset[tuple[str, str]]:
    record = _read(folder)
    return record.files if record is not None and record.writer == writer else frozenset()


def _is_own(folder: Path, name: str, own: frozenset[tuple[str, str]]) -> bool:
    """Whether a file is there as it was written."""
    file = folder / name
    known = any(name == one for one, _ in own) and file.is_file() and not file.is_symlink()
    return known and (name, _digest(file)) in own


def _digests(folder: Path) -> frozenset[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD_FILE]
    return frozenset((path.relative_to(folder).as_posix(), _digest(path)) for path in files)


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _read(folder: Path) -> _Record | None:
    """The folder's record; None where there is none, or one that we did not write."""
    try:
        content = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return _Record(str(content["writer"]), frozenset((str(name), str(digest)) for name, digest in content["files"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(folder: Path, record: _Record) -> None:
    if _read(folder) != record:
        write_json(folder / RECORD_FILE, {"writer": record.writer, "files": sorted(record.files)})
