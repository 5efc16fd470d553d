"""Texts that a user may give, which a terminal or a page of Markdown would obey."""

import random

from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite

PIECES = [
    "[/x]",
    "[bold]",
    "[",
    "]",
    "\x1b[2J",
    "\x1b]0;t\x07",
    "\r",
    "\t",
    ":smile:",
    "|",
    "`",
    "<b>",
    "\u202e",
    "é",
    "a",
]
PIECES += ["é", "a", "\\", "\n", "[link=x]", "\x7f", "\x9b31m", "9" * 5000, "²"]


def texts(seed, count):
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 4))) for _ in range(count)]


def plan_with(text, name="layer.0.q"):
    entries = (PlannedSite(Site(name, 4, 4), 2, 4, r=2, alpha=4, score=1.0),)
    options = {"adapters": text, "kind": text, text: [text]}
    return AdapterPlan(entries, rule=text, base_model=text, options=options, versions={text: text})


def assert_plain(output):
    assert all(char.isprintable() or char == "\n" for char in output), ascii(output[:500])
