"""The documents are true: python blocks run, shell commands exist, public names are described, links lead somewhere."""

import doctest
import inspect
import pkgutil
import re
import runpy
import shlex
import warnings
from ast import literal_eval
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import weightlora
from weightlora.bench.grid import read_grid
from weightlora.cli import main
from weightlora.methods import METHODS
from weightlora.model.sites import Site
from weightlora.plan.limits import LIMITS, check_limit
from weightlora.plan.plan import AdapterPlan, PlannedSite
from weightlora.runs.recipe import read_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *PAGES]
#: What runs a command of the documents: the file of this repository that runs it, and the text it runs it with.
#: Commands that need a hub, several processes or hours are run there with local substitutes; each is also parsed below.
RUN_BY = {
    "make setup": ("Makefile", "check: setup"),
    "make check": (".ci/run", "make check"),
    "make test": (".ci/run", "make test"),
    "make fuzz": ("Makefile", "pytest -m fuzz"),
    "make test-all": ("Makefile", "test-all:"),
    "make examples": ("Makefile", ".ci/examples"),
    "python examples/classification.py": ("tests/test_examples.py", '"classification"'),
    "python examples/trl_sft.py": ("tests/test_examples.py", '"trl_sft"'),
    "make docs": ("Makefile", "mkdocs build --strict"),
    "make demo": ("Makefile", "weightlora demo"),
    "pip install": ("Makefile", "-m pip install"),
    ".venv/bin/pre-commit install": (".pre-commit-config.yaml", "repos:"),
    "weightlora demo": ("tests/cli/test_demo.py", '"demo"'),
    "weightlora select": ("tests/cli/test_cli.py", '"select"'),
    "weightlora show": ("tests/test_documents.py", '"show"'),
    "weightlora methods": ("tests/test_documents.py", '"methods"'),
    "weightlora train": ("tests/runs/test_train.py", '"train"'),
    "weightlora estimate": ("tests/cost/test_cost.py", '"estimate"'),
    "weightlora emit": ("tests/stacks/test_stacks.py", '"emit"'),
    "weightlora check": ("tests/serving/test_serving.py", '"check"'),
    "weightlora export": ("tests/serving/test_serving.py", '"export"'),
    "weightlora squeeze": ("tests/serving/test_squeeze.py", '"squeeze"'),
    "weightlora doctor": ("tests/cli/test_cli.py", '"doctor"'),
    "weightlora report": ("tests/report/test_page.py", '"report"'),
    "weightlora bench merge": ("tests/bench/test_records.py", '"bench", "merge"'),
    "weightlora bench": ("tests/bench/test_bench.py", '"bench"'),
    "weightlora paper": ("tests/paper/test_paper.py", '"paper"'),
    "weightlora analyse": ("tests/runs/test_gradient_study.py", '"analyse"'),
    "torchrun": ("tests/test_distributed.py", "select_for"),
    "accelerate launch": ("tests/test_distributed.py", "select_for"),
}
_BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^ *```(?:sh|bash|shell|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(text):
    """The code of each block, with blank lines before it so that a traceback names the document's line."""
    for match in _BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].splitlines())
        yield "\n" * text[: match.start("code")].count("\n") + code


def commands(text):
    """The words of each command in the shell blocks, without comments; continued lines are one command."""
    for block in _SHELL.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        yield from filter(None, (shlex.split(re.sub(r"(^|\s)#.*", "", line)) for line in lines))


def documented():
    found = {shlex.join(words): words for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))}
    return list(found.values())


def own(words):
    """The words that ``weightlora`` is given, whatever launches it; None where it is another program."""
    if "-m" in words:
        words = words[words.index("-m") + 1 :]
    written = words.index(">") if ">" in words else None  # into a file
    return words[1:written] if words[0] == "weightlora" else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "document"}
    # README's; readme_walk.py takes all. Of 150 steps two score.
    text = document.read_text(encoding="utf-8").replace("max_steps=300", "max_steps=150")
    for code in blocks(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            exec(compile(code, str(document), "exec"), namespace)


def test_limits_that_readme_and_faq_name_are_allowed():
    """Those in comments and tables as well, which no block runs."""
    named = [
        (name, literal_eval(value))
        for document in ("README.md", "docs/faq.md", "docs/guides/choose.md")
        for name, value in re.findall(
            r"\b(adapters|parameters|time|memory)=(\"[^\"]*\"|[\d_.]*\d)", (ROOT / document).read_text(encoding="utf-8")
        )
    ]
    assert {name for name, _ in named} == {*LIMITS}
    for name, value in named:
        check_limit(name, value)


def test_the_first_screen_of_readme_has_sixty_lines():
    before, _, after = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where to read on\n")
    assert len(before.splitlines()) + len(after.strip().partition("\n\n")[0].splitlines()) + 2 <= 60


def test_there_are_blocks_to_run():
    assert sum(len(list(blocks(path.read_text(encoding="utf-8")))) for path in DOCUMENTS) >= 10
    for guide in ("start", "choose", "train", "methods"):
        assert list(blocks((ROOT / "docs" / "guides" / f"{guide}.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_names_its_language(document):
    """A command in a block without one would be neither run nor parsed."""
    opening = re.findall(r"^ *```(.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)[::2]
    assert all(opening)


@pytest.mark.parametrize("words", documented(), ids=shlex.join)
def test_every_command_is_run_somewhere(words):
    rows = [RUN_BY[start] for start in RUN_BY if f"{shlex.join(words)} ".startswith(f"{start} ")]
    assert rows, "no row of RUN_BY says what runs it"
    for file, text in rows:
        assert text in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not run it with {text}"


def parsed(words, monkeypatch, capsys):
    """What the command line makes of ``words``, all options checked, without running the command."""
    chosen = []
    files = {path.stem for path in (ROOT / "src" / "weightlora" / "cli").glob("[a-z]*.py")}
    two = "_".join(words[:2])
    name = two if two in files else words[0]
    assert name in files
    monkeypatch.setattr(import_module(f"weightlora.cli.{name}"), "run", chosen.append)
    assert main(words) == 0, capsys.readouterr().err
    if chosen[0].rest and words[1] != "peft":  # options of a recipe and of transformers' TrainingArguments
        read_recipe(words=chosen[0].rest)
    return chosen[0]


@pytest.mark.parametrize("words", list(filter(None, map(own, documented()))), ids=shlex.join)
def test_every_command_is_one_of_ours_with_known_options(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parsed(words, monkeypatch, capsys)


@pytest.mark.parametrize(
    "words", [["train", "--adaptrs", "0.5"], ["show"], ["methods", "--taks"], ["train", "--adapters", "2.5"]]
)
def test_a_wrong_command_would_be_seen(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, weightlora.WeightLoraError)):
        parsed(words, monkeypatch, capsys)


@pytest.mark.parametrize(
    "words", [words for words in filter(None, map(own, documented())) if words[0] in ("show", "methods")]
)
def test_quick_commands_are_run_as_they_are(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "select").mkdir(parents=True)
    sites = [Site(f"layers.{i}.{name}", 8, 8) for i in range(2) for name in ("key", "query")]
    entries = tuple(PlannedSite(site, 4, 8, r=4 * site.name.endswith("query"), alpha=8, score=1.0) for site in sites)
    AdapterPlan(entries).save(tmp_path / "runs" / "select" / "plan.json")
    assert main(words) == 0
    shown = {"show": "query", "methods": METHODS[0].name, "--rules": "integrated", "--tasks": "rte"}
    assert shown[words[-1] if words[-1] in shown else words[0]] in capsys.readouterr().out


def test_the_benchmark_of_the_guide_can_be_read(tmp_path):
    text = (ROOT / "docs" / "guides" / "methods.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / "b.yaml"
    path.write_text(block, encoding="utf-8")
    grid = read_grid(path)
    assert [row.label for row in grid.rows][:3] == ["lora", "random, K = 1", "random, K = 5"]


@pytest.mark.parametrize("name", [entry.name for entry in METHODS])
def test_every_method_has_a_section_and_a_row(name):
    _, *parted = re.split(r"^## (.+)\n", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert parted[::2].count(name) == 1, f"docs/methods.md has no section {name}, or two"
    section = parted[parted.index(name) + 1]
    parts = (
        "Idea.**",
        "Formula.**",
        "When.**",
        "| argument |",
        "Cost.**",
        "Exports**",
        "Limits.**",
        "Differs",
    )
    places = [section.find(part) for part in parts]
    assert min(places) >= 0, f"docs/methods.md, {name}: lacks {parts[places.index(-1)]}"
    assert places == sorted(places)
    for option in inspect.signature(import_module(f"weightlora.methods.{name}").build).parameters:
        assert f"`{option}`" in section or option == "options", f"docs/methods.md, {name}: does not explain {option}"
    assert f"| `{name}` |" in (ROOT / "docs" / "guides" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", weightlora.__all__)
def test_every_public_name_is_on_an_api_page(name):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
    assert sum(f"::: weightlora.{name}\n" in page for page in pages) == 1


def test_every_page_is_in_the_navigation_of_the_site():
    def paths(entry):
        children = entry.values() if isinstance(entry, dict) else entry
        return {entry} if isinstance(entry, str) else {path for child in children for path in paths(child)}

    navigation = paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = {path.relative_to(ROOT / "docs") for path in PAGES}
    drawn = {path for path in pages if path.parts[0] == "results" and path.name != "README.md"}
    assert navigation == {path.as_posix() for path in pages - drawn}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files(document):
    for target in _LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{name_of(document)} links to {target}"


def test_the_demo_named_in_the_readme_is_the_module_of_the_command():
    assert "run" in runpy.run_module("weightlora.cli.demo")


# -- every example in a docstring is run, and says the truth ---------------------------------------------------------

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(weightlora.__path__, "weightlora.") if "__main__" not in info.name
)
#: Files whose functions are called by users: each shows how.
SHOWN = (
    *(
        "model.sites",
        "model.gates",
        "model.restore",
        "plan.budget",
        "plan.limits",
        "plan.plan",
        "plan._screen",
        "fast.enable",
        "fast.step",
    ),
    *(
        "selection.allocate",
        "selection.scoring",
        "selection.select",
        "selection.rules",
        "selection.rules.paper",
        "selection.rules.first_order",
    ),
    *("selection.rules.pursuit", "selection.rules.integrated"),
    *("trainer.attach", "methods", "text"),
)


def examples(module: str) -> list[doctest.DocTest]:
    return [found for found in doctest.DocTestFinder().find(import_module(module)) if found.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_true(module, tmp_path):
    for example in examples(module):
        example.globs["tmp_path"] = tmp_path
        report: list[str] = []
        failed, tried = doctest.DocTestRunner().run(example, out=report.append)
        assert tried > 0
        assert failed == 0, "".join(report)


@pytest.mark.parametrize("room", SHOWN)
def test_what_users_call_has_an_example(room):
    assert examples(f"weightlora.{room}")


def test_a_wrong_example_would_be_seen():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(wrong, out=lambda _: None).failed == 1
