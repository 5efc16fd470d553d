"""Texts of users on the terminal: markup, escape sequences, line breaks, half characters."""

import re
import warnings
from pathlib import Path

import pytest
from fuzz import assert_plain, plan_with, texts

from weightlora.bench.table import Cell, Table, to_terminal
from weightlora.cli import main
from weightlora.cli._screen import PlainConsole
from weightlora.cli._streams import one_line_warnings
from weightlora.text import natural


@pytest.mark.parametrize("text", texts(0, 30), ids=lambda _: "text")
def test_show_prints_any_text_and_reads_none(text, tmp_path, capsys):
    path = tmp_path / "plan.json"
    name = "".join(char for char in text if char.isprintable())  # no plan holds another
    plan_with(text, name=f"layer.0.{name}").save(path)
    assert main(["show", str(path)]) == 0
    assert_plain(capsys.readouterr().out)


def test_markup_is_shown_as_it_is_written(tmp_path, capsys):
    plan_with("[/x] [bold]b :smile: \x1b[2J").save(tmp_path / "plan.json")
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    assert "[/x] [bold]b :smile: \\x1b[2J" in capsys.readouterr().out


@pytest.mark.parametrize("text", [*texts(1, 30), "\ud800"], ids=lambda _: "text")
@pytest.mark.parametrize("command", [["show"], ["estimate"], ["train", "--config"], ["select", "--config"], ["bench"]])
def test_an_error_is_one_printable_line(command, text, capsys):
    assert main([*command, text.replace("\x00", "")[:200] + ".none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("weightlora: error: ")
    assert error.count("\n") == 1
    assert_plain(error)


def test_a_warning_is_printable(capsys):
    with one_line_warnings():
        warnings.warn("a\x1b[2Jb", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "weightlora: warning: a\\x1b[2Jb\n"


@pytest.mark.parametrize("text", texts(2, 20), ids=lambda _: "text")
def test_a_benchmarks_table_and_lines_are_printable(text, capsys):
    console = PlainConsole()
    console.print(to_terminal(Table((text, text), ((Cell(text), Cell(text)),))))
    console.print(text)
    assert_plain(capsys.readouterr().out)


def test_every_command_prints_to_the_plain_console():
    """No other file of the command line makes a console."""
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in Path(main.__code__.co_filename).parent.glob("*.py")
    }
    makers = {name for name, text in texts.items() if re.search(r"(?<!Plain)Console\(\)", text)}
    assert makers == set()


def test_numbers_of_any_length_sort_as_numbers():
    """Also digits that ``int`` does not read, and more of them than it reads."""
    names = ["a.2", "a.10", "a.010x", "a.²", "a." + "9" * 5000, "a." + "1" + "0" * 5000]
    expected = ["a.2", "a.10", "a.010x", "a." + "9" * 5000, "a.1" + "0" * 5000, "a.²"]
    assert sorted(names, key=natural) == expected
