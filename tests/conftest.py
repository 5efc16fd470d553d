"""Options of the tests; the fixtures are in tests/real_parts.py."""

import pytest


def pytest_configure(config):
    """Load the fixtures where tests run: the process that hands them out need not import PyTorch."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("real_parts")


def pytest_addoption(parser):
    parser.addoption("--short", action="store_true", help="`make test`: without what is slow, and a sample of cases")


def pytest_collection_modifyitems(config, items):
    """With ``--short`` leave out the marked ``slow``, and of the cases of a ``sampled`` test all but a few."""
    if not config.getoption("short"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for item in items if item.get_closest_marker("slow") is not None}
    for of_one in cases.values():
        left_out |= set(of_one) - set(_spread(of_one, *of_one[0].get_closest_marker("sampled").args))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _spread(cases, number):
    """``number`` of the cases: the first, and from two on the last and those evenly between them."""
    if number >= len(cases):
        return cases
    return [cases[round(i * (len(cases) - 1) / max(number - 1, 1))] for i in range(number)]
