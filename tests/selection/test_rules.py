"""Rules by their name, as an object, and by an import path: the same plan, and one line for whatever is wrong."""

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from scipy.stats import spearmanr
from selecting import BY_GRADIENT, BY_INPUTS
from test_scoring import Net, batches, squared

from weightlora import select
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.runs.recipe import read_recipe
from weightlora.selection._course import agreement_of, rank_correlation
from weightlora.selection.rules import RULES, rule_of, settings_of
from weightlora.selection.rules.base import jackknife

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


# -- standard errors and agreement of scores: closed forms, scipy, and random rankings as the control ----------------


def test_of_a_mean_the_error_is_the_usual_one():
    torch.manual_seed(0)
    batches = torch.randn(8, 5, dtype=torch.float64)
    found = jackknife(lambda chosen: batches[list(chosen)].mean(0), 8)
    assert found.scores == pytest.approx(batches.mean(0).tolist())
    assert found.errors == pytest.approx((batches.std(0) / 8**0.5).tolist())
    assert found.halves[0] == pytest.approx(batches[::2].mean(0).tolist())
    assert found.halves[1] == pytest.approx(batches[1::2].mean(0).tolist())


def test_of_the_size_of_a_mean_it_is_the_spread_over_new_batches():
    """|mean of 8 numbers around 3|: the standard error of a mean of 8 with a standard deviation of 1 is 0.354."""
    torch.manual_seed(0)
    batches = 3 + torch.randn(8, 4000, dtype=torch.float64)
    errors = torch.tensor(jackknife(lambda chosen: batches[list(chosen)].mean(0).abs(), 8).errors)
    assert errors.square().mean().sqrt().item() == pytest.approx(8**-0.5, rel=0.02)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=12))
def test_the_rank_correlation_is_scipys(pairs):
    a, b = zip(*pairs, strict=True)
    constant = len(set(a)) == 1 or len(set(b)) == 1
    expected = 0.0 if constant else spearmanr(a, b).statistic
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-9)


def test_scores_that_two_halves_rank_alike_are_trusted_and_random_ones_are_not():
    scores, shuffled = list(range(30)), list(range(30))
    noisy = [score + 6 * (-1) ** score for score in scores]
    assert agreement_of((scores, noisy)) > 0.8
    random.Random(1).shuffle(shuffled)  # a correlation of −0.2
    with pytest.warns(WeightLoraWarning, match="these scores cannot tell the sites apart.*a random choice"):
        assert agreement_of((scores, shuffled)) == pytest.approx(spearmanr(scores, shuffled).statistic)
    assert agreement_of((scores[:9], scores[:9][::-1])) == pytest.approx(-1)  # too few sites to say anything


# -- a block whose query, key and value compute what nothing reads: every rule by the loss sees it -------------------

OUTPUT = "bert.encoder.layer.4.attention.output.dense"
DEAD = {f"bert.encoder.layer.4.attention.self.{name}" for name in ("query", "key", "value")}
BY_LOSS = (
    "first_order",
    "pursuit",
    "integrated",
    "integrated_ranks",
    *(path for name, path in BY_GRADIENT.items() if name != "aletheia"),  # which keeps whole blocks
)
BLIND = ("kappa_tune", "stratified", *BY_INPUTS.values())


def plan_of(rule, model, batches, parameters):
    with torch.no_grad():
        model.get_submodule(OUTPUT).weight.zero_()
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", exclude_modules=[OUTPUT])
    asked = {"lora": lora, "parameters": parameters, "steps": 4, "progress": False}
    return select(model, batches, rule=rule_of(rule, head_steps=0) if rule in BY_LOSS else rule, **asked)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rule", BY_LOSS)
def test_dead_layers_score_nothing_and_are_not_kept(rule, minilm, review_batches):
    with pytest.warns(WeightLoraWarning, match="3 of 35 sites had no gradient in the scoring"):
        plan = plan_of(rule, minilm, review_batches * 2, parameters=0.1)
    assert {name for name, score in plan.scores.items() if score == 0} == DEAD
    assert not DEAD & {*plan.names}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rule", BLIND)
def test_rules_that_do_not_read_the_loss_miss_it(rule, minilm, review_batches):
    """The control: dead layers can be kept."""
    assert DEAD & {*plan_of(rule, minilm, review_batches * 2, parameters=0.9).names}
