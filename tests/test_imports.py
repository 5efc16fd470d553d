"""Imports run one way, the package loads nothing heavy, and no shortcuts are taken."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import weightlora

SOURCE = Path(weightlora.__file__).parent
ROOT = SOURCE.parents[1]
#: The rooms in their order: a file imports from rooms that stand before its own, and from its own.
ROOMS = (
    *("errors", "text", "files", "folders", "validation"),
    *(
        "model",
        "plan",
        "fast",
        "cost",
        "selection",
        "methods",
        "trainer",
        "tasks",
        "serving",
        "stacks",
        "runs",
        "report",
        "bench",
        "paper",
        "cli",
    ),
)
#: Files that a registry finds by the name that a user types; nothing else need import them.
REGISTERED = re.compile(r"methods\.[a-z_]+|selection\.rules\.[a-z_]+|tasks\.[a-z_]+|cli\.[a-z_]+")
HEAVY = {"torch", "peft", "transformers", "numpy", "matplotlib"}


@cache
def modules() -> dict[str, str]:
    """Source of every module by its dotted name, without the package itself."""
    found = {path.relative_to(SOURCE).with_suffix("").parts: path for path in sorted(SOURCE.rglob("*.py"))}
    named = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in found.items()}
    return {name: path.read_text(encoding="utf-8") for name, path in named.items() if name not in ("", "__main__")}


@cache
def imported(source: str) -> tuple[str, ...]:
    """Everything of weightlora that is imported, anywhere: in functions and under TYPE_CHECKING too."""
    return tuple(_imported(ast.parse(source)))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"weightlora.<relative>.{node.module or ''}"]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            argument = node.args[0]
            names = [argument.value] if isinstance(argument, ast.Constant) else []
        else:
            continue
        yield from (name.removeprefix("weightlora.") for name in names if f"{name}.".startswith("weightlora."))


def room_of(name: str) -> str:
    return name.split(".")[0]


def is_private(name: str) -> bool:
    """Whether a dotted name leads to a file of one room alone; ``__version__`` is no file."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[:-1])


def wrong_imports(module: str, source: str) -> list[str]:
    """What ``module`` may not import."""
    room = room_of(module)
    before = ROOMS[: ROOMS.index(room)] if room in ROOMS else ()
    wrong: list[str] = []
    for name in imported(source):
        upward = room_of(name) not in (*before, room, "__version__")
        private = is_private(f"{name}.") and room_of(name) != room
        method = module.startswith("methods.") and name.startswith("methods.")
        neighbour = method and name.split(".")[1] not in ("base", "families")
        if upward or private or neighbour:
            wrong.append(name)
    return wrong


@cache
def imported_by_room() -> dict[str, set[str]]:
    """What each room, the benchmarks and the public names import of weightlora."""
    found: dict[str, set[str]] = {"": set(imported((SOURCE / "__init__.py").read_text(encoding="utf-8")))}
    for name, source in modules().items():
        found.setdefault(room_of(name), set()).update(imported(source))
    for path in (ROOT / "benchmarks").rglob("*.py"):
        found[""].update(imported(path.read_text(encoding="utf-8")))
    return found


def is_used_outside(module: str) -> bool:
    others = (names for room, names in imported_by_room().items() if room != room_of(module))
    return any(f"{name}.".startswith(f"{module}.") for name in itertools.chain(*others))


def test_every_module_belongs_to_a_room():
    assert {room_of(name) for name in modules()} <= set(ROOMS)
    assert {room_of(name) for name in modules() if "." in name} == set(ROOMS[5:])
    assert len(modules()) >= 20


def test_imports_run_one_way():
    wrong = {module: wrong_imports(module, source) for module, source in modules().items()}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_a_file_is_private_exactly_where_only_its_room_uses_it():
    wrong: list[str] = []
    for module in (name for name in modules() if "." in name):
        shared = module.startswith("methods.families")  # the room's own, named so
        package = (SOURCE / module.replace(".", "/")).is_dir()
        if not (shared or package or REGISTERED.fullmatch(module)):
            wrong += [module] if is_private(f"{module}.") == is_used_outside(module) else []
    assert wrong == []


def test_a_test_of_a_room_uses_the_private_files_of_that_room_alone():
    wrong: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        room, *inside = path.relative_to(ROOT / "tests").parts
        private = [name for name in imported(path.read_text(encoding="utf-8")) if is_private(f"{name}.")]
        foreign = {name for name in private if room_of(name) != room}
        if inside and foreign:  # the others are about the whole package
            wrong[str(path)] = foreign
    assert wrong == {}


def test_the_docs_show_the_rooms_in_their_order():
    rooms = " · ".join(ROOMS)
    assert rooms in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").replace("\n", " ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.sites", "from weightlora.plan.plan import AdapterPlan"),
        ("model.sites", "import weightlora.plan.plan as p"),
        ("model.sites", "def f():\n    from weightlora.plan.plan import AdapterPlan"),
        ("model.sites", "if TYPE_CHECKING:\n    from weightlora.plan.plan import AdapterPlan"),
        ("model.sites", "from weightlora import plan"),
        ("model.sites", "from weightlora import AdapterPlan"),
        ("model.sites", "import weightlora"),
        ("model.sites", "from . import errors"),
        ("model.sites", "from .layers import lora_layers"),
        ("model.sites", "importlib.import_module('weightlora.plan')"),
        ("trainer.attach", "from weightlora.plan._schema import Rank"),
        ("trainer.attach", "from weightlora.plan import _schema"),
        ("trainer.attach", "import weightlora.plan._schema"),
        ("errors", "from weightlora.files import whole_file"),
        ("methods.a", "from weightlora.methods.b import build"),
        ("methods.a", "from weightlora.methods import make_method"),
        ("methods.a", "from weightlora.bench.grid import read_grid"),
        ("attic", "from weightlora.errors import OptionError"),
    ],
)
def test_the_walk_sees_a_wrong_import_wherever_it_hides(module, source):
    assert wrong_imports(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan.plan", "import json\nfrom torch import nn\nfrom weightlora.model.sites import Site"),
        ("plan.plan", "from weightlora.plan._schema import read_plan_file"),
        ("methods.a", "from weightlora.methods.base import Method\nfrom weightlora.selection.select import select"),
        ("methods.a", "from weightlora.methods.families.export import become_stock"),
        ("methods", "from weightlora.methods.base import Method"),
        ("cli.show", "from weightlora import __version__\nfrom weightlora import errors"),
        ("plan.plan", "import weightlora_of_someone_else"),
    ],
)
def test_the_walk_lets_right_imports_pass(module, source):
    assert wrong_imports(module, source) == []


# -- the public names -------------------------------------------------------------------------------------------------


def test_every_public_name_resolves_and_no_other_does():
    for name in weightlora.__all__:
        assert getattr(weightlora, name) is not None
    assert set(weightlora.__all__) <= set(dir(weightlora))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = weightlora.no_such_name


def test_no_public_name_is_also_a_submodule():
    """Importing ``weightlora.select`` the module would put it in the place of ``weightlora.select`` the function."""
    assert set(weightlora.__all__) & {name.split(".")[0] for name in modules()} == set()
    for name in modules():
        import_module(f"weightlora.{name}")
    assert callable(weightlora.select)


def test_the_console_script_resolves():
    (script,) = entry_points(group="console_scripts", name="weightlora")
    assert callable(script.load())


def loaded_by(statement: str) -> set[str]:
    """Every module that a fresh interpreter loads for ``statement``."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import weightlora", "weightlora"),
        ("from weightlora import AdapterPlan", "weightlora.plan.plan"),
        ("from weightlora.methods import METHODS, make_method", "weightlora.methods"),
        ("from weightlora import find_sites, WeightLoraError", "weightlora.model.sites"),
    ],
)
def test_the_package_loads_nothing_heavy(statement, light):
    loaded = loaded_by(statement)
    assert light in loaded
    assert loaded & HEAVY == set()


def test_a_heavy_import_would_be_seen():
    assert "numpy" in loaded_by("import weightlora, numpy")


# -- no shortcuts ----------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "pickle": "a file from elsewhere could run code",
    "dill": "a file from elsewhere could run code",
    "monkeypatch": "code of others stays as it is",
    "hasattr": "types tell what there is",
    "eval": "names are data, not code",
    "exec": "names are data, not code",
}


def shortcuts(source: str) -> set[str]:
    """Forbidden names that the code uses; words in texts and ``model.eval()`` are no names."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            used |= {part for alias in node.names for part in alias.name.split(".")}
            used |= set((getattr(node, "module", None) or "").split("."))
    return used & FORBIDDEN.keys()


def test_no_shortcuts():
    assert {module: found for module, source in modules().items() if (found := shortcuts(source))} == {}


def test_the_walk_sees_shortcuts_and_nothing_else():
    assert shortcuts("import pickle") == {"pickle"}
    assert shortcuts("from pickle import loads") == {"pickle"}
    assert shortcuts("if hasattr(model, 'x'): eval('1')") == {"hasattr", "eval"}
    assert shortcuts("'no pickle, no hasattr'\nmodel.eval()") == set()
