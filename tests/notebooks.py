"""Write the notebooks in ``examples/`` from the scripts there: the same code, cell by cell.

python tests/notebooks.py        # as `make docs` does; git does not track them

A script's docstring becomes the first cell, ``# %% Title`` starts a cell with a heading above it. One call differs: a
notebook has no command line, so that ``parse_args()`` reads an empty one and the settings are the defaults.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = tuple(sorted(EXAMPLES.glob("*.py")))


def notebook(script: str) -> str:
    """The notebook of a script, as JSON in nbformat 4.5."""
    described, *cells = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)
    title, _, text = described.strip().strip('"').partition("\n")
    made = [cell("markdown", f"# {title.removesuffix('.')}\n{text}")]
    for heading, code in zip(cells[::2], cells[1::2], strict=True):
        if heading.strip():
            made.append(cell("markdown", f"## {heading.strip()}"))
        made.append(cell("code", code.replace("parser.parse_args()", "parser.parse_args([])")))
    whole = {
        "cells": [{"id": f"cell-{number}", **one} for number, one in enumerate(made)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def cell(kind: str, source: str) -> dict[str, Any]:
    made: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source.strip().splitlines(keepends=True)}
    return {**made, "execution_count": None, "outputs": []} if kind == "code" else made


if __name__ == "__main__":
    for path in SCRIPTS:
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
