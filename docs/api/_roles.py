"""Docstrings as the site reads them: roles such as :func: become links, and an ``Example:`` a block of code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod|exc):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)  # griffe's name of the section is in the plural
_PUBLIC = re.compile(r"weightlora\.[A-Za-z_]+$")


def _link(match: re.Match[str]) -> str:
    target = match[1]
    if target.startswith("AdapterPlan."):
        target = f"weightlora.{target}"
    linked = _PUBLIC.match(target) or target.startswith("weightlora.AdapterPlan.")
    return f"[`{match[1]}`][{target}]" if linked else f"`{match[1]}`"


class Roles(griffe.Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            linked = _ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", linked)
