"""Generators of cases: how much they try, and costs, damaged files and texts of users to try; see CONTRIBUTING.md."""

import json
import os
import random
import sys
from copy import deepcopy
from hashlib import sha256

from weightlora.cost.knapsack import ANY, Item, make_cost
from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite

#: None: the small numbers that the suite runs with. 1: the numbers of ``make fuzz``; 0.1: a tenth of them.
FACTOR = os.environ.get("WEIGHTLORA_FUZZ")


def cases(suite, full):
    """The number of cases: ``suite``, or where WEIGHTLORA_FUZZ is given, that times ``full``."""
    return suite if FACTOR is None else max(suite, round(float(FACTOR) * full))


def generator(number=0):
    """Random numbers that WEIGHTLORA_FUZZ_SEED changes; ``number`` tells the generators of a file apart."""
    return random.Random(10**6 * int(os.environ.get("WEIGHTLORA_FUZZ_SEED", "0")) + number)


def tell(capsys, text):
    """Print the counts of a generator, whatever pytest captures."""
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")


# -- costs of sets of sites, as models have them ---------------------------------------------------------------------


def random_cost(draw, n):
    """Sites one above the other, some side by side with a shared input, each with things of all kinds that cost."""
    order = draw.sample(range(n), n)
    items = [Item(draw.randint(0, 30), ((ANY, 1 << n),))]
    place = 0
    while place < n:
        group = order[place : place + draw.randint(1, 3)]
        under = sum(1 << i for i in order[:place])
        items.append(Item(draw.randint(0, 20), tuple((1 << i, 1 << i) for i in group)))
        for i in group:
            items.append(Item(draw.randint(1, 10), ((1 << i, 1 << i),)))
            items.append(Item(draw.randint(0, 5), ((1 << i, under),)))
            items.append(Item(draw.randint(0, 10), ((ANY, under | 1 << i),)))
        place += len(group)
    return make_cost(n, items, order)


# -- JSON files with something wrong in them -------------------------------------------------------------------------

#: What takes the place of a value; a raw text cannot be written by ``json.dumps``.
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 1e-320, 10**30, -(10**30), 2**63, 10**400),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "a", "[/x]", "\x1b[31m", "\ud800", "\u0000", "a\nb", "é", "(", "none", "5" * 5000),
    *([], [1], ["a"], [None], [[1, 2]], {}, {"a": 1}, {"": None}),
]
RAW = ["9" * 5000, "[" * 100_000, "NaN", "Infinity", "1e999", "-", "\ufeff", "", '"\\ud800"', "tru", "0x1"]


def places(value, path=()):
    """The path of every value in a JSON tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def put(tree, path, change):
    """``tree`` with ``change`` applied to the container of ``path`` and its last key."""
    if not path:
        return change({"": tree}, "")[""]
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return tree


def mutated(rng, tree, fields):
    """The text of ``tree`` with one to three changes."""
    raw = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(tree)))
        kind, value = (
            rng.choice(("value", "value", "value", "drop", "twice", "new", "raw")),
            deepcopy(rng.choice(VALUES)),
        )

        def change(container, key, kind=kind, value=value):
            if kind == "drop":
                del container[key]
                return {"": None}
            if kind == "twice" and isinstance(container, list):
                container.append(container[key])
            elif kind == "new" and isinstance(container, dict):
                container[rng.choice(fields)] = value
            else:
                container[key] = "@raw@" if kind == "raw" else value
            return container

        raw = rng.choice(RAW) if kind == "raw" else raw
        tree = put(tree, path, change)
    if rng.random() < 0.5 and isinstance(tree, dict):  # an edit that hides itself
        try:
            lines = "\n".join(f"{s['name']} {s['in_features']} {s['out_features']}" for s in tree["sites"])
            tree["fingerprint"] = sha256(lines.encode()).hexdigest()
        except (KeyError, TypeError, ValueError):
            pass
    text = json.dumps(tree)
    text = text if raw is None else text.replace('"@raw@"', raw)
    if rng.random() < 0.1:
        cut = rng.randrange(len(text) + 1)
        text = text[:cut] + rng.choice(("", "", "}", '"', "\x00", "\xff", "[")) + text[cut + rng.randrange(3) :]
    return text


def assert_one_line(error):
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 700, text


# -- texts of users, which a terminal or a page of Markdown would obey -----------------------------------------------

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
