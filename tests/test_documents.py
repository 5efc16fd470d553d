"""Every python block of the documents runs, each file's blocks one after another in one namespace."""

import inspect
import re
import runpy
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from weightlora.methods import METHODS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


def blocks(text):
    """The code of each block, with blank lines before it so that a traceback names the document's line."""
    for match in _BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].splitlines())
        yield "\n" * text[: match.start("code")].count("\n") + code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "document"}
    for code in blocks(document.read_text(encoding="utf-8")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            exec(compile(code, str(document), "exec"), namespace)


def test_there_are_blocks_to_run():
    assert sum(len(list(blocks(path.read_text(encoding="utf-8")))) for path in DOCUMENTS) >= 3


@pytest.mark.parametrize("name", [entry.name for entry in METHODS])
def test_every_method_has_a_page_and_a_row(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    for part in ("**Idea.**", "**Formula.**", "| argument |", "**Cost.**", "**Exports**", "**Differs", "**Row"):
        assert part in page, f"docs/methods/{name}.md lacks {part}"
    for option in inspect.signature(import_module(f"weightlora.methods.{name}").build).parameters:
        assert f"`{option}`" in page or option == "options", f"docs/methods/{name}.md does not explain {option}"
    assert f"| `{name}` |" in (ROOT / "docs" / "guides" / "methods.md").read_text(encoding="utf-8")


def test_the_demo_named_in_the_readme_is_the_module_of_the_command():
    assert "run" in runpy.run_module("weightlora.cli.demo")
