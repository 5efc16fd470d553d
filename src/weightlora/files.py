"""Write files and folders atomically: complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightlora.errors import DataError, OutputError


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
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(descriptor)
        draft = Path(name)
        draft.chmod(0o666 & ~_umask())  # mkstemp creates private files
        yield draft
        draft.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Generator[Path]:
    """Yield a temporary folder that replaces ``path`` when the block ends without an error.

    Raises:
        OutputError: The parent folder cannot be written, or the disk is full.
    """
    path = Path(path)
    draft: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        draft.chmod(0o777 & ~_umask())
        yield draft
        if path.exists():
            # Move the old folder first: whatever happens, one of the two is complete.
            old = draft.with_name(draft.name + "-old")
            path.replace(old)
            draft.replace(path)
            shutil.rmtree(old)
        else:
            draft.replace(path)
    except OutputError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Move the folder ``source`` to ``target``, in the place of what is there.

    Raises:
        OutputError: The folder cannot be moved.
    """
    with whole_folder(target) as draft:
        draft.rmdir()
        shutil.move(source, draft)


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


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        DataError: The file is missing, not YAML, or holds no mapping.

    Example:
        >>> write_text(tmp_path / "a.yaml", "keep: 0.5")
        >>> read_mapping(tmp_path / "a.yaml")
        {'keep': 0.5}
    """
    import yaml

    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # not UTF-8, a bad date, 5,000 digits
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; give lines of 'option: value'")
    return content  # pyright: ignore[reportUnknownVariableType]


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
        raise _cannot_write(path, error) from error
    return path


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; choose another output folder")


def _umask() -> int:
    """The process's umask; reading it requires setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
