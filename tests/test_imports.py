"""Imports run one way, the package loads nothing heavy, and no shortcuts are taken."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import weightlora

SOURCE = Path(weightlora.__file__).parent
# A room may import only what stands to its left, and its own files.
ROOMS = (
    *("errors", "files", "allocator", "sites", "budget", "cost", "stoiht", "gates", "checkpointing", "dropout"),
    *("onednn", "lora_step", "fast_layer", "fast_lora", "untouched", "plan_file", "plan", "processes", "tracing"),
    *("timing", "estimate"),
    *(
        "warmup",
        "tokens",
        "probe",
        "selection",
        "spectrum",
        "stock",
        "triplets",
        "sensitivity",
        "moving",
        "placement",
        "batches",
        "growth",
        "trainer",
    ),
    *("methods", "applied", "tasks", "recipe", "hub", "train", "analysis"),
    *("bench", "report", "cli"),
)
HEAVY = {"torch", "peft", "transformers", "numpy", "matplotlib"}


def modules() -> dict[str, str]:
    """Source of every module by its dotted name, without the package's door."""
    found = {path.relative_to(SOURCE).with_suffix("").parts: path for path in sorted(SOURCE.rglob("*.py"))}
    named = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in found.items()}
    return {name: path.read_text(encoding="utf-8") for name, path in named.items() if name not in ("", "__main__")}


def imported(source: str) -> Iterator[str]:
    """Everything of weightlora that is imported, anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
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


def wrong_imports(module: str, source: str) -> list[str]:
    """What ``module`` may not import."""
    room = module.split(".")[0]
    allowed = ROOMS[: ROOMS.index(room)] if room in ROOMS else ()
    allowed = (*allowed, room, "__version__")  # the version is text in the door itself
    wrong = [name for name in imported(source) if name.split(".")[0] not in allowed]
    if module.startswith("methods."):  # a method stands on the protocol alone, not on its neighbours
        wrong += [name for name in imported(source) if name.startswith("methods") and name.split(".")[1] != "base"]
    return wrong


def test_every_module_belongs_to_a_room():
    assert {name.split(".")[0] for name in modules()} <= set(ROOMS)
    assert len(modules()) >= 20


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module):
    assert wrong_imports(module, modules()[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sites", "from weightlora.plan import AdapterPlan"),
        ("sites", "import weightlora.plan as p"),
        ("sites", "def f():\n    from weightlora.plan import AdapterPlan"),
        ("sites", "if TYPE_CHECKING:\n    from weightlora.plan import AdapterPlan"),
        ("sites", "from weightlora import plan"),
        ("sites", "from weightlora import AdapterPlan"),
        ("sites", "import weightlora"),
        ("sites", "from . import errors"),
        ("sites", "from .plan import AdapterPlan"),
        ("sites", "importlib.import_module('weightlora.plan')"),
        ("errors", "from weightlora.files import whole_file"),
        ("methods.a", "from weightlora.methods.b import build"),
        ("methods.a", "from weightlora.methods import make_method"),
        ("methods.a", "from weightlora.bench.run import Settings"),
        ("attic", "from weightlora.errors import OptionError"),
    ],
)
def test_the_walk_sees_a_wrong_import_wherever_it_hides(module, source):
    assert wrong_imports(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "import json\nfrom torch import nn\nfrom weightlora.sites import Site"),
        ("methods.a", "from weightlora.methods.base import Method\nfrom weightlora.selection import select"),
        ("methods", "from weightlora.methods.base import Method"),
        ("cli.show", "from weightlora.cli.errors import exits\nfrom weightlora import errors"),
        ("plan", "import weightlora_of_someone_else"),
    ],
)
def test_the_walk_lets_right_imports_pass(module, source):
    assert wrong_imports(module, source) == []


# -- the door --------------------------------------------------------------------------------------------------------


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
        ("from weightlora import AdapterPlan", "weightlora.plan"),
        ("from weightlora import METHODS, make_method", "weightlora.methods"),
        ("from weightlora import Site, find_sites, WeightLoraError", "weightlora.sites"),
    ],
)
def test_the_door_loads_nothing_heavy(statement, light):
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


@pytest.mark.parametrize("module", modules())
def test_no_shortcuts(module):
    assert shortcuts(modules()[module]) == set()


def test_the_walk_sees_shortcuts_and_nothing_else():
    assert shortcuts("import pickle") == {"pickle"}
    assert shortcuts("from pickle import loads") == {"pickle"}
    assert shortcuts("if hasattr(model, 'x'): eval('1')") == {"hasattr", "eval"}
    assert shortcuts("'no pickle, no hasattr'\nmodel.eval()") == set()
