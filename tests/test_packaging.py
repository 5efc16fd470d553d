"""What the package declares is what it imports: core packages anywhere, those of an extra only where they are used."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import weightlora

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

SOURCE = Path(weightlora.__file__).parent
ROOT = SOURCE.parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: Distributions whose import name is another than their own.
IMPORTS = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
#: Imported, but never installed alone: scikit-learn brings scipy, transformers packaging, pydantic typing_extensions;
#: what partitions a model is DeepSpeed, so that it is there.
BROUGHT = {"scipy": "sklearn", "packaging": "transformers", "deepspeed": "accelerate", "typing_extensions": "pydantic"}


def requirements(lines: list[str]) -> list[Requirement]:
    """The distributions of an extra, without the extras that it includes."""
    return [r for r in map(Requirement, lines) if r.name != "weightlora"]


def import_name(requirement: Requirement) -> str:
    return IMPORTS.get(requirement.name, requirement.name.replace("-", "_"))


CORE = {import_name(r) for r in requirements(PROJECT["dependencies"])}
OPTIONAL = {import_name(r) for extra in EXTRAS if extra not in ("dev", "docs") for r in requirements(EXTRAS[extra])}


def third_party(source: str) -> Iterator[tuple[str, bool]]:
    """Top-level name of every foreign import, and whether importing the file runs it."""

    def walk(node: ast.AST, runs: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], runs) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level and child.module:
                yield child.module.split(".")[0], runs
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, runs and not inside and not typing_only)

    for name, runs in walk(ast.parse(source), True):
        if name not in (*sys.stdlib_module_names, "weightlora"):
            yield name, runs


def test_what_is_imported_is_declared():
    """What importing a file runs comes with the package; what an extra brings is imported where it is used."""
    wrong: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for name, runs in third_party(path.read_text(encoding="utf-8")):
            if BROUGHT.get(name, name) not in (CORE if runs else CORE | OPTIONAL):
                wrong.setdefault(str(path), set()).add(name)
    assert wrong == {}


def test_what_is_declared_is_imported():
    used = {name for path in SOURCE.rglob("*.py") for name, _ in third_party(path.read_text(encoding="utf-8"))}
    by_name_only = {"gguf", "bitsandbytes", "tensorboard"}  # transformers imports them
    assert used >= CORE
    assert used | by_name_only >= OPTIONAL


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import datasets.x", [("datasets", True)]),
        ("class A:\n    from datasets import Dataset", [("datasets", True)]),
        ("def f():\n    import datasets", [("datasets", False)]),
        ("if TYPE_CHECKING:\n    import datasets", [("datasets", False)]),
        ("try:\n    import datasets\nexcept ImportError:\n    pass", [("datasets", True)]),
        ("import json\nfrom weightlora import errors\nfrom . import x", []),
    ],
)
def test_the_walk_sees_every_import(source, found):
    assert list(third_party(source)) == found


def test_each_lower_bound_is_one_of_the_fresh_environment():
    lines = (ROOT / "requirements" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {r.name: str(r.specifier) for r in map(Requirement, (x for x in lines if not x.startswith("#")))}
    declared = {r.name: str(r.specifier).replace(">=", "==") for r in requirements(PROJECT["dependencies"])}
    del declared["torch"]  # the file says why
    assert lowest == declared


def test_all_includes_every_extra_and_dev_includes_all():
    [every] = map(Requirement, EXTRAS["all"])
    assert every.extras == set(EXTRAS) - {"all", "dev", "docs"}
    assert any(Requirement(line).extras == {"all"} for line in EXTRAS["dev"])


def test_errors_name_extras_that_exist():
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    named = {extra for text in texts.values() for extra in re.findall(r"weightlora\[([a-z]+)\]", text)}
    named |= {e for text in texts.values() for e in re.findall(r'require_extra\("\w+", "(\w+)"\)', text)}
    assert named
    assert named <= set(EXTRAS)
