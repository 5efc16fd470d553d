"""Write files atomically: complete, or not at all. ``folders.py`` does the same with folders."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from weightlora.errors import DataError, OptionError, OutputError, WeightLoraError, WeightLoraWarning
from weightlora.text import closest

#: How the names begin of files and folders that are being written.
DRAFT = ".weightlora-draft-"
#: A file in a scratch folder, locked for as long as its process lives.
_HELD = "held"
_DEEPEST, _MOST = 50, 10_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: How safetensors, and torch where it saves, say that they cannot write; neither raises an OSError.
_UNWRITTEN = re.compile(
    rf"while serializing|PytorchStreamWriter|inline_container|os error ({'|'.join(map(str, _FULL))})\b"
)


@contextmanager
def written(folder: str | Path) -> Generator[None]:
    """Turn a library's failure to write into an :class:`OutputError`: a full disk, or anything below ``folder``.

    Raises:
        OutputError: The block could not write.

    Example:
        >>> with written(tmp_path):  # doctest: +ELLIPSIS
        ...     (tmp_path / "no" / "such" / "folder").write_text("text")
        Traceback (most recent call last):
        ...
        weightlora.errors.OutputError: cannot write ...: No such file or directory; choose another output folder
    """
    try:
        yield
    except WeightLoraError:
        raise
    except Exception as error:
        found = _unwritten(error, Path(folder).absolute())
        if found is None:
            raise
        raise cannot_write(Path(folder), found) from error


def _unwritten(error: BaseException | None, folder: Path) -> OSError | None:
    """What says that something could not be written, in an error or what led to it; None where nothing does."""
    if error is None:
        return None
    if isinstance(error, OSError):
        below = isinstance(error.filename, str) and Path(error.filename).absolute().is_relative_to(folder)
        if below or error.errno in _FULL:
            return error
    elif _UNWRITTEN.search(str(error)):
        return OSError(" ".join(str(error).split())[:120])
    return _unwritten(error.__cause__ or error.__context__, folder)


@contextmanager
def whole_file(path: str | Path) -> Generator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    Args:
        path: The file to write; its folder is created if missing.

    Raises:
        OutputError: The folder cannot be created or written, or the disk is full.

    Example:
        >>> with whole_file(tmp_path / "a.txt") as draft:
        ...     _ = draft.write_text("all or nothing")
        >>> (tmp_path / "a.txt").read_text()
        'all or nothing'
    """
    path = Path(path)
    draft: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Keep the suffix: savers such as matplotlib choose the format by it.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=DRAFT, suffix=path.suffix)
        os.close(descriptor)
        draft = Path(name)
        draft.chmod(0o666 & ~_umask())  # mkstemp creates private files
        yield draft
        draft.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


@contextmanager
def scratch_folder(parent: Path) -> Generator[Path]:
    """Yield a temporary folder in ``parent`` that is removed when the block ends.

    Those that killed processes left there are removed, too.

    Raises:
        OutputError: ``parent`` cannot be written.
    """
    with ExitStack() as stack:
        try:
            _remove_scratch_of_the_dead(parent)
            scratch = tempfile.TemporaryDirectory(dir=parent, prefix=DRAFT, ignore_cleanup_errors=True)
            stack.enter_context(scratch)
            stack.callback(os.close, _held(Path(scratch.name)))
            files = Path(scratch.name, "files")
            files.mkdir()
        except OSError as error:
            raise cannot_write(parent, error) from error
        yield files


def _held(scratch: Path) -> int:
    """Return an open file in ``scratch`` that is locked until it is closed; it has its name from when it is locked."""
    file = scratch / "new"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(OSError):  # a file system without locks, or Windows, which renames no open file
        _lock(descriptor)
        file.rename(scratch / _HELD)
    return descriptor


def _remove_scratch_of_the_dead(parent: Path) -> None:
    for file in parent.glob(f"{DRAFT}*/{_HELD}"):
        with suppress(OSError):  # somebody else's, or removed meanwhile
            descriptor = os.open(file, os.O_RDWR)
            try:
                if _lock(descriptor):
                    shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def remove_drafts(folder: Path) -> None:
    """Remove the unfinished files and folders that a killed process left in ``folder``; nobody may be writing there."""
    for draft in folder.glob(f"{DRAFT}*"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Generator[None]:
    """Keep other processes out of ``folder`` for the block; a process that is killed leaves it free.

    The folder is created if missing, and removed if the block leaves it empty. What a killed process had not finished
    writing there is removed.

    Raises:
        OptionError: Another process works there.
        OutputError: The folder cannot be written.

    Warns:
        WeightLoraWarning: The file system has no locks.
    """
    file = folder / ".lock"
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(folder, error) from error
    mine = False
    try:
        # Its holder may have removed the file after it was opened here; a lock on a removed file keeps nobody out.
        mine = (
            _lock_or_warn(descriptor, folder) and file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())
        )
        if not mine:
            raise OptionError(f"another process works in {folder}; wait for it, or choose another output_dir")
        remove_drafts(folder)
        yield
    finally:
        if mine:
            with suppress(OSError):  # Windows removes no open file
                file.unlink()
        os.close(descriptor)
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def _lock_or_warn(descriptor: int, folder: Path) -> bool:
    """Return what :func:`_lock` returns, and True after a warning where the file system has no locks."""
    try:
        return _lock(descriptor)
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}); make sure that no other process writes there",
            WeightLoraWarning,
            stacklevel=3,
        )
    return True


def _lock(descriptor: int) -> bool:
    """Lock an open file, until it is closed or the process ends; False where another process has it.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def write_json(path: str | Path, value: Any, *, default: Callable[[Any], Any] | None = None) -> None:
    """Write ``value`` as JSON, atomically.

    Raises:
        OutputError: See :func:`whole_file`.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=default) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write ``text``, atomically.

    Raises:
        OutputError: See :func:`whole_file`.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: The file is missing, or is not JSON.

    Example:
        >>> write_json(tmp_path / "a.json", {"keep": 0.5})
        >>> read_json(tmp_path / "a.json")
        {'keep': 0.5}
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {_one_line(error)}") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or in its part ``FILE#NAME``; an empty file is an empty mapping.

    Raises:
        DataError: The file is missing, not YAML, or holds no mapping.
        OptionError: The file has no part of this name.

    Example:
        >>> write_text(tmp_path / "a.yaml", "keep: 0.5")
        >>> read_mapping(tmp_path / "a.yaml")
        {'keep': 0.5}
    """
    import yaml

    file, _, part = str(path).rpartition("#")
    if file and not Path(path).exists():
        parts = read_mapping(file)
        found: Any = parts.get(part)
        if not isinstance(found, dict):
            known = [str(name) for name in parts]
            raise OptionError(f"{file} has no part {part!r:.80}{closest(part, known)}; there are {', '.join(known)}")
        return found  # pyright: ignore[reportUnknownVariableType]
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except Exception as error:  # for a malformed date, number or tag, PyYAML raises whatever Python does
        raise DataError(f"cannot read {path}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; give lines of 'option: value'")
    return content  # pyright: ignore[reportUnknownVariableType]


def is_deep(content: Any) -> bool:
    """Return whether lists and mappings are more than 50 deep or have millions of entries, as no file of ours has.

    What is nearly as deep as Python's stack would be read, and end in a RecursionError wherever it is shown; what
    refers to itself has no end.

    Example:
        >>> is_deep({"a": [{"b": 1}]}), is_deep(eval("[" * 51 + "]" * 51))
        (False, True)
    """
    level: list[Any] = [content]
    for _ in range(_DEEPEST + 1):
        inner = [
            list(one.values()) if isinstance(one, dict) else one
            for one in level
            if isinstance(one, dict | list | tuple)
        ]
        if not inner:
            return False
        if sum(map(len, inner)) > _MOST:
            return True
        level = [child for children in inner for child in children]
    return True


def writable_folder(path: str | Path) -> Path:
    """Return ``path`` if it is, or can be created as, a writable folder; call it before long work.

    It creates nothing, so that nothing is left if the work is refused afterwards.

    Raises:
        OutputError: The folder cannot be created or written.
    """
    path = Path(path)
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error that says why ``path`` cannot be written."""
    return OutputError(f"cannot write {path}: {error.strerror or error}; choose another output folder")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _umask() -> int:
    """The process's umask; reading it requires setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
