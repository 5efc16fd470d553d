"""Every example in a docstring is run, and says the truth."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import weightlora

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
        "fast.dropout",
        "fast.enable",
    ),
    *(
        "plan._alternatives",
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
