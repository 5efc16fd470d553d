"""Modules and names that a ``LoraConfig`` asks for and that get no adapter, or that match nothing."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from weightlora.errors import SiteError, WeightLoraWarning
from weightlora.text import closest

if TYPE_CHECKING:
    from peft import LoraConfig

#: Modules that a warning names.
_SHOWN = 3


def unmatched_targets(
    lora: LoraConfig,
    read: LoraConfig,
    modules: Iterable[str],
    linear: Collection[str],
    parameters: Collection[str],
) -> dict[str, str]:
    """The listed target parameters that the model has not, each with a reason to skip it.

    Args:
        lora: The wanted adapters.
        read: The same as PEFT reads it; names of fused experts are parameters there.
        modules: Names of all modules.
        linear: Names of the linear layers, among which the closest name is looked for.
        parameters: Names of the parameters that get an adapter.

    Raises:
        SiteError: An entry of the list ``target_modules`` is the name or the ending of no module.
    """
    fused = (
        set()
        if isinstance(lora.target_modules, str)
        else set(lora.target_modules or ()) - set(read.target_modules or ())
    )
    missing = set(_missing(lora.target_modules, modules)) - (fused if parameters else set())
    if missing:
        named = ", ".join(f"{entry!r}{_hint(entry, linear)}" for entry in sorted(missing)[:_SHOWN])
        raise SiteError(f"target_modules: no module is named {named}; correct the name, or leave it out")
    wanted = sorted(lora.target_parameters or ())
    nowhere = [entry for entry in wanted if not any(f".{name}".endswith(f".{entry}") for name in parameters)]
    return dict.fromkeys(nowhere, "no parameter has this name")


def warn_of_leftovers(
    lora: LoraConfig,
    left_out: Mapping[str, str],
    modules: Iterable[str],
    sites: Sequence[str],
    parameters: Collection[str],
) -> None:
    """Warn where a part of ``lora`` has no effect.

    Args:
        lora: The wanted adapters.
        left_out: Modules and names that ``lora`` asks for and that get no adapter, with the reasons.
        modules: Names of all modules.
        sites: Names of the candidates.
        parameters: Names of the parameters that get an adapter.
    """
    if left_out:
        named = [f"{name}: {reason}" for name, reason in left_out.items()]
        if lora.target_modules is None:
            _warn(
                f"some linear layers get no adapter ({_few(named)}); exclude_modules leaves them out without a warning"
            )
        else:
            _warn(f"target_modules asks for modules that get no adapter ({_few(named)}); change target_modules")
    excluded = [f"{entry!r}{_hint(entry, sites)}" for entry in _missing(lora.exclude_modules, modules)]
    if excluded:
        _warn(f"exclude_modules has names that no module has ({_few(excluded)}); change or remove them")
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        unused = [f"{key!r}{_hint(key, sites)}" for key in patterns or () if not _reaches(key, [*sites, *parameters])]
        if unused:
            _warn(f"{field} has keys that match no site ({_few(unused)}); change or remove them")


def _missing(entries: str | Collection[str] | None, modules: Iterable[str]) -> list[str]:
    """The entries of a list that PEFT would find nowhere; a regular expression has none."""
    if entries is None or isinstance(entries, str):
        return []
    endings = {".".join(parts[i:]) for name in modules for parts in [name.split(".")] for i in range(len(parts))}
    return sorted(set(entries) - endings)


def _reaches(key: str, sites: Iterable[str]) -> bool:
    from peft.utils.other import get_pattern_key

    # Where no key matches, the function returns the name itself.
    return any(get_pattern_key([key], name) == key for name in sites)


def _hint(entry: str, names: Iterable[str]) -> str:
    """The closest of the names' endings with as many parts as the entry has."""
    parts = entry.count(".") + 1
    return closest(entry, {".".join(name.split(".")[-parts:]) for name in names})


def _few(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def _warn(text: str) -> None:
    warnings.warn(text, WeightLoraWarning, stacklevel=4)
