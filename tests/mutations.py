"""JSON files with something wrong in them, for the generators of damaged plans and adapters."""

import json
from copy import deepcopy
from hashlib import sha256

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
