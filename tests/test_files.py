import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from weightlora.errors import DataError, OptionError, OutputError
from weightlora.files import (
    DRAFT,
    only_writer,
    read_json,
    read_mapping,
    scratch_folder,
    whole_file,
    writable_folder,
    write_json,
    written,
)
from weightlora.folders import own_files, whole_folder


def write(path, text, *, fail_with=None):
    """Write ``text`` to a file, or to a file in a folder, raising midway where asked to."""
    with whole_file(path) if path.suffix else whole_folder(path, "a test") as draft:
        (draft / "part.txt" if draft.is_dir() else draft).write_text(text)
        if fail_with:
            raise fail_with


def read(path):
    return (path / "part.txt" if path.is_dir() else path).read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_finished_block_replaces_the_target_and_leaves_no_draft(tmp_path, name):
    path = tmp_path / "made" / "on the way" / name
    write(path, "old, and longer than the new")
    write(path, "new")
    assert read(path) == "new"
    assert names(path.parent) == [name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_an_exception_in_the_block_keeps_the_old_content_and_passes_through(tmp_path, name, error):
    with pytest.raises(error):
        write(tmp_path / name, "half", fail_with=error())
    assert names(tmp_path) == []
    write(tmp_path / name, "old")
    with pytest.raises(error):
        write(tmp_path / name, "half", fail_with=error())
    assert names(tmp_path) == [name]
    assert read(tmp_path / name) == "old"


def test_the_target_is_untouched_while_the_block_runs(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
        assert draft.suffix == ".png", "savers choose the format by the suffix"
        assert draft.parent == path.parent, "a rename is only atomic within one file system"


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_result_is_as_readable_as_any_other_file(tmp_path, name):
    write(tmp_path / name, "text")
    plain = tmp_path / "plain"
    plain.mkdir() if name == "folder" else plain.touch()
    assert (tmp_path / name).stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", ["a.txt", "folder", "deeper/a.txt", "deeper/folder"])
def test_a_place_that_cannot_be_written_is_one_line_that_names_it(tmp_path, name):
    (tmp_path / "file").write_text("in the way")  # a path below a file cannot be made, not even by root
    path = tmp_path / "file" / name
    with pytest.raises(OutputError) as caught:
        write(path, "text")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_link_stays_and_the_folder_that_it_points_to_is_replaced(tmp_path):
    write(tmp_path / "elsewhere", "old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        write(tmp_path / name, "new")
        assert read(tmp_path / name) == "new"
        assert (tmp_path / name).is_symlink()
    assert read(tmp_path / "elsewhere") == read(tmp_path / "nowhere") == "new"
    assert names(tmp_path) == ["dangling", "elsewhere", "link", "nowhere"]


def test_a_link_of_the_user_that_points_nowhere_is_not_replaced(tmp_path):
    (tmp_path / "plan.json").symlink_to(tmp_path / "unplugged" / "plan.json")
    with (
        pytest.raises(OutputError, match=r"plan\.json was not written by a test"),
        own_files(tmp_path, "a test") as own,
    ):
        (own / "plan.json").write_text("new")
    assert (tmp_path / "plan.json").is_symlink()
    assert names(tmp_path) == ["plan.json"]


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="notes: a file is there"), whole_folder(tmp_path / "notes", "a test"):
        pytest.fail("the work began")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["adapters: 2001-99-99", "a: !!bool x", "a: !!timestamp x", "a: !!int ''", "[" * 9999, "\0"]
)
def test_yaml_that_cannot_be_read_is_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=r"^cannot read [^\n]*a.yaml: [^\n]+$"):
        read_mapping(tmp_path / "a.yaml")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5_000])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"^cannot read [^\n]*a.json: [^\n]+$"):
        read_json(tmp_path / "a.json")


def test_an_output_error_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", 1)


FULL_DISK = """
import resource, signal, sys
from weightlora.errors import OutputError
from weightlora.files import write_json
from weightlora.folders import whole_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails as it does on a full disk
limit, kind = int(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if kind == "file":
        write_json("result", "x" * 10_000)
    else:
        with whole_folder("result", "a test") as draft:
            (draft / "small").write_text("fits")
            (draft / "large").write_text("x" * 10_000)
except OutputError as error:
    print(error)
"""


KILLED = """
import os, pathlib, signal
from weightlora.folders import whole_folder
with whole_folder("result", "a test") as draft:
    (draft / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, and a rename of an open file")
def test_the_next_who_writes_removes_what_a_killed_process_left(tmp_path):
    """A process that is alive, here this one, keeps its own, and what is no draft of ours stays."""
    (tmp_path / f"{DRAFT}of-the-user").mkdir()
    with scratch_folder(tmp_path) as mine:
        (mine / "a").write_text("mine")
        subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False)
        assert len(names(tmp_path)) == 3
        write(tmp_path / "result", "whole")
        assert len(names(tmp_path)) == 3
        assert read(tmp_path / "result") == "whole"
        assert (mine / "a").read_text() == "mine"
    assert names(tmp_path) == [f"{DRAFT}of-the-user", "result"]


@pytest.mark.skipif(sys.platform == "win32", reason="the longest path of Linux and macOS")
def test_a_scratch_folder_that_has_no_room_for_files_is_told(tmp_path):
    """Of a parent this deep the scratch folder has a path that can be named, and what is in it has none."""
    longest = os.pathconf(tmp_path, "PC_PATH_MAX") - 1
    deep, depth = tmp_path, longest - len(f"/{DRAFT}12345678")
    while len(str(deep)) < depth:
        left = depth - len(str(deep)) - 1
        deep /= "d" * (left if left <= 100 else 99)
    deep.mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot write"), scratch_folder(deep):
        pass
    assert names(deep) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_keeps_the_old_content_and_leaves_no_draft(tmp_path, kind):
    def run(limit):
        arguments = [sys.executable, "-c", FULL_DISK, str(limit), kind]
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    old = tmp_path / "result"
    if kind == "folder":
        with whole_folder(old, "a test") as draft:
            (draft / "small").write_text("old")
    else:
        old.write_text("old")
    assert run(5_000).startswith("cannot write result: File too large")
    assert names(tmp_path) == ["result"]
    assert (old / "small" if kind == "folder" else old).read_text() == "old"
    if kind == "folder":
        assert names(old) == [".weightlora.json", "small"]
    assert run(20_000) == "", "with room enough the same script writes"
    assert (old / "large" if kind == "folder" else old).stat().st_size >= 10_000


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_reads_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert names(tmp_path) == []
    write_json(tmp_path / "a.json", {"a": {2}}, default=list)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [2]}


def test_a_writable_folder_is_found_and_not_made(tmp_path):
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert writable_folder(tmp_path) == tmp_path
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*/file/b: Not a directory"):
        writable_folder(tmp_path / "file" / "b")


def test_a_folder_that_does_not_exist_yet_is_asked_where_it_would_be_made():
    """Not even the superuser makes folders in /proc."""
    with pytest.raises(OutputError, match="cannot write /proc/a/b"):
        writable_folder("/proc/a/b")


# -- one writer --------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from weightlora.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_until_it_is_killed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(folder)
        for same in (folder, Path("run"), tmp_path / "link"):
            with pytest.raises(OptionError, match="another process works in"), only_writer(same):
                pytest.fail("two writers")
        holder.kill()
    with only_writer(folder), pytest.raises(OptionError), only_writer(folder):
        pytest.fail("two writers")
    assert names(folder) == []  # it was there before this process


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_lock_leaves_nothing_and_keeps_what_was_written(tmp_path, error):
    with pytest.raises(error) if error else nullcontext(), only_writer(tmp_path / "a" / "b"):
        assert names(tmp_path / "a" / "b") == [".lock"]
        if error:
            raise error
    assert names(tmp_path) == []
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "text").touch()
    assert names(tmp_path / "a" / "b") == ["text"]


def test_a_lock_on_a_removed_file_is_none(tmp_path, monkeypatch):
    """Its holder removes the file between this process's opening and locking it."""
    opened = os.open

    def open_and_lose(path, *more):
        descriptor = opened(path, *more)
        Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    with pytest.raises(OptionError, match="another process"), only_writer(tmp_path):
        pytest.fail("nobody is kept out by this lock")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    for folder in (tmp_path / "file" / "run", tmp_path / "run"):
        with pytest.raises(OutputError, match=f"cannot write {folder}"), only_writer(folder):
            pytest.fail("there is no lock")


# -- what libraries cannot write -----------------------------------------------------------------------------------


def test_a_librarys_failure_to_write_is_one_line(tmp_path):
    led = RuntimeError("a library's own")
    led.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    torchs, rusts = RuntimeError("PytorchStreamWriter failed writing file"), SafetensorError("while serializing: no")
    below = NotADirectoryError(errno.ENOTDIR, "Not a directory", str(tmp_path / "file" / "a"))
    for error in (led.__cause__, led, torchs, rusts, below):
        with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}: [^\n]+$"), written(tmp_path):
            raise error


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "no", "/else/where"), OptionError("x")])
def test_other_errors_pass_through(tmp_path, error):
    with pytest.raises(type(error)) as caught, written(tmp_path):
        raise error
    assert caught.value is error
