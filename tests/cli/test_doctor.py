import re

import pytest
from packaging.requirements import Requirement

from weightlora.cli import doctor, main


def test_a_whole_installation_is_ready(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    states = re.findall(r"  (ready|.*run: .*)\s*$", said, re.MULTILINE)
    assert states == ["ready"] * 9  # tests are run with every extra and the embedded wheels
    for package in ("torch", "transformers", "peft"):
        assert package in said


@pytest.mark.parametrize(
    ("needed", "fault"),
    [
        ("no-such-package>=1", "no-such-package is missing"),
        ("rich>=999", "rich .* is not >=999"),
        ("rich>=1", ""),
    ],
)
def test_what_is_missing_or_too_old_is_named(needed, fault, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_required", lambda extra: [] if extra else [Requirement(needed)])
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == bool(fault)
    line = next(line for line in capsys.readouterr().out.splitlines() if "Python functions" in line)
    assert re.search(f"{fault}; run: pip install" if fault else "ready", line)


def test_every_extra_has_a_use():
    from importlib.metadata import metadata

    extras = set(metadata("weightlora").get_all("Provides-Extra") or [])
    assert {extra for extra in doctor._USES if extra} == extras - {"all", "dev", "docs"}
