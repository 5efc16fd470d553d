"""Rules by their name, as an object, and by an import path: the same plan, and one line for whatever is wrong."""

import subprocess
import sys

import pytest
from peft import LoraConfig
from test_scoring import Net, batches, squared

from weightlora import select
from weightlora.errors import OptionError
from weightlora.runs.recipe import read_recipe
from weightlora.selection.rules import RULES, rule_of, settings_of

MINE = '''
from dataclasses import dataclass

from weightlora.selection.rules.base import Rule, Scores


@dataclass(frozen=True)
class Last(Rule):
    """The last sites by name."""

    least: int = 1

    def score(self, stage, steps, budget):
        scores = tuple(float(self.least + i) for i in range(len(stage.layers)))
        yield steps[-1], Scores((scores,), (True,) * len(scores), scores)


class Unfinished(Rule):
    pass


class NoRule:
    pass
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's file in the current directory, which no installed command finds by itself."""
    (tmp_path / "my_rules.py").write_text(MINE)
    (tmp_path / "broken_rules.py").write_text("def f(:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield
    for name in ("my_rules", "broken_rules"):
        sys.modules.pop(name, None)


def chosen(rule):
    options = {"lora": LoraConfig(r=2), "adapters": 1, "steps": 2, "progress": False}
    return select(Net(), batches(2), rule=rule, loss_fn=squared, **options)


@pytest.mark.usefixtures("mine")
def test_a_rule_of_ones_own_by_its_path_and_as_an_object_is_the_same():
    path = "my_rules:Last"
    plan = chosen(path)
    assert plan.names == ("layers.3",)
    assert plan.rule == path
    assert (plan.options["least"], plan.options["head_steps"]) == (1, 0)
    import my_rules  # pyright: ignore[reportMissingImports]

    assert chosen(my_rules.Last()) == plan
    assert rule_of(plan.rule) == my_rules.Last()
    assert settings_of(rule_of(path, least=3)) == {"head_steps": None, "least": 3}
    recipe = read_recipe(words=["--rule", path, "--rule_options", "least=2"])
    assert recipe.method.scored_by == my_rules.Last(least=2)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("no_such_module:Last", r"no_such_module cannot be imported \(ModuleNotFoundError: .*start in the directory"),
        ("broken_rules:Last", r"broken_rules cannot be imported \(SyntaxError"),
        ("my_rules:Lats", r"Lats is no rule of my_rules \(closest: 'Last'\); give a class derived from"),
        ("my_rules:NoRule", "NoRule is no rule of my_rules"),
        ("my_rules:Unfinished", "Unfinished is no rule of my_rules.*has score"),
        ("my_rules:chosen()", "give package.module:Class"),
        ("my_rules.Last", "give one of first_order, .*or your own as package.module:Class"),
        (":", "give package.module:Class"),
        ("fisher", r"rule='fisher' is not allowed.*give one of first_order"),
    ],
)
def test_a_wrong_path_is_one_line(rule, text):
    with pytest.raises(OptionError, match=text) as error:
        rule_of(rule)
    assert "\n" not in str(error.value)
    with pytest.raises(OptionError, match=text):
        read_recipe(words=["--rule", rule])


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lest": 2}, r"rule my_rules:Last has no setting 'lest' \(closest: 'least'\); it has head_steps, least"),
        ({"least": 1.5}, "least=1.5 is not allowed: give a whole number"),
        ({"head_steps": -1}, "head_steps=-1 is not allowed"),
    ],
)
def test_settings_of_ones_own_rule_are_checked(settings, text):
    with pytest.raises(OptionError, match=text):
        rule_of("my_rules:Last", **settings)


def test_the_names_of_the_registry_are_those_of_their_rules():
    """The first name of a class is what a plan calls it; further ones are the same rule with other settings."""
    for entry in RULES:
        rule = rule_of(entry.name)
        assert rule.name == next(each.name for each in RULES if each.path == entry.path)
        assert rule_of(entry.path, **entry.settings) == rule


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_the_command_line_finds_a_rule_in_the_current_directory(tmp_path):
    """``weightlora`` itself, in a process of its own, as an installed command starts it."""
    script = tmp_path / "bin" / "weightlora"
    script.parent.mkdir()
    script.write_text("from weightlora.cli import main; raise SystemExit(main())")
    words = ["train", "--rule", "my_rules:Lats", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Lats is no rule of my_rules (closest: 'Last')" in done.stderr
