"""Every way to spend a LoRA budget, with the same interface; each with its paper.

model = make_method("selected", adapters=0.5).attach(model, lora, batches, total_steps)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from weightlora.errors import OptionError
from weightlora.plan.limits import LIMITS, check_limit
from weightlora.text import closest
from weightlora.validation import check_arguments

if TYPE_CHECKING:
    from weightlora.methods.base import Method as Method


@dataclass(frozen=True)
class MethodEntry:
    """A line of the registry; the method itself lives in the file of the same name."""

    name: str
    summary: str
    paper: str
    reads: Literal["nothing", "inputs", "loss"] = "loss"
    """What its choice depends on: no data, the inputs of the layers, or the loss with its labels."""
    trains: Literal["lora", "ranks", "other"] = "lora"
    """``"lora"``: the plan's stock LoRA from the first step to the last. ``"ranks"``: LoRA whose ranks or gradients a
    callback changes. ``"other"``: other parameters, converted to LoRA at the end."""
    batch: Literal["micro", "step"] = "micro"
    """What it reads as one batch: a micro-batch, or all micro-batches of an optimizer step, weighted as in training."""
    reuses_plan: bool = False
    """Whether a stored plan made with the same options is used instead of choosing again."""
    keeps_budget: bool = True
    """Whether it ends within plain LoRA's ranks."""
    begins_training: bool = False
    """Whether its choice takes the first steps of a trainer's training, which goes on from a checkpoint."""


#: Kept as one readable list. A new method is a file with ``build(**options) -> Method`` and a line here.
METHODS = (
    MethodEntry(
        "full",
        "all weights of the model: the reference",
        "Table 1",
        reads="nothing",
        trains="other",
        keeps_budget=False,
    ),
    MethodEntry("lora", "rank r on every site: the budget", "Hu et al. 2021, arXiv:2106.09685", reads="nothing"),
    MethodEntry("random", "K random sites: the control", "RLoRA, Veprikov et al., Table 7", reads="nothing"),
    MethodEntry(
        "selected",
        "what a selection keeps within the limits: the default",
        "docs/guides/choose.md",
        batch="step",
        reuses_plan=True,
    ),
    MethodEntry(
        "weightlora",
        "the first steps choose K adapters by their gates",
        "Veprikov et al., section 2",
        batch="step",
        reuses_plan=True,
        begins_training=True,
    ),
    MethodEntry(
        "weightlora_plus",
        "the same adapters at rank r·n/K",
        "section 2.2",
        batch="step",
        reuses_plan=True,
        begins_training=True,
    ),
    MethodEntry("dot_product", "the K adapters that moved furthest along the gradient", "section 2.1"),
    MethodEntry(
        "eva", "ranks and A from the principal components of the inputs", "Paischer et al. 2024", reads="inputs"
    ),
    MethodEntry(
        "adalora",
        "the least important singular values are pruned in training",
        "Zhang et al. 2023, arXiv:2303.10512",
        trains="ranks",
    ),
    MethodEntry(
        "alora",
        "ranks that contribute little are moved to other sites",
        "Liu et al. 2024, arXiv:2403.16187",
        trains="ranks",
    ),
    MethodEntry(
        "increlora",
        "every site starts at rank 1; the important ones grow",
        "Zhang et al. 2023, arXiv:2308.12043",
        trains="ranks",
    ),
    MethodEntry("flexora", "the blocks whose weight grows on held-out rows", "Wei et al. 2025, ACL"),
    MethodEntry("lora_drop", "the adapters with the strongest output", "Zhou et al. 2025, arXiv:2402.07721"),
    MethodEntry(
        "dynamic_lora",
        "components with a small share of the update are pruned",
        "Mao et al. 2024, arXiv:2405.17357",
        trains="ranks",
    ),
    MethodEntry(
        "pruned_lora",
        "a large rank is pruned, by the same count at every site",
        "Yu et al. 2025, arXiv:2510.00192",
        reads="nothing",
        trains="ranks",
    ),
    MethodEntry(
        "flexlora",
        "clients of several ranks; their average is split by SVD",
        "Bai et al. 2024, arXiv:2402.11505",
        reads="nothing",
        trains="ranks",
    ),
    MethodEntry("melora", "N mini adapters on N blocks of features", "Ren et al. 2024, ACL", reads="nothing"),
    MethodEntry("dora", "PEFT's DoRA, which stays DoRA", "Liu et al. 2024, arXiv:2402.09353", reads="nothing"),
    MethodEntry(
        "riemannian",
        "LoRA with preconditioned gradients",
        "Zhang and Pilanci 2024, arXiv:2402.02347",
        reads="nothing",
        trains="ranks",
    ),
    MethodEntry(
        "vera",
        "two vectors per site between shared random matrices",
        "Kopiczko et al. 2023, arXiv:2310.11454",
        reads="nothing",
        trains="other",
    ),
    MethodEntry(
        "vb_lora",
        "A and B composed from one bank of vectors",
        "Li et al. 2024, arXiv:2405.15179",
        reads="nothing",
        trains="other",
    ),
    MethodEntry(
        "tied_lora",
        "one A and one B for all sites of a shape, scaled at each",
        "Renduchintala et al. 2023, arXiv:2311.09578",
        reads="nothing",
        trains="other",
    ),
    MethodEntry(
        "nora",
        "a small adapter between frozen singular vectors of W0",
        "Lin et al. 2024, arXiv:2408.10280",
        reads="nothing",
        trains="other",
    ),
    MethodEntry(
        "milora",
        "the smallest singular triplets of W0 are trained",
        "Wang et al. 2024, arXiv:2406.09044",
        reads="nothing",
        trains="other",
    ),
)

#: Names that are looked for here, and where they are.
_ELSEWHERE = {
    "rlora": "the paper's RLoRA is method 'random'",
}


def make_method(name: str, **options: Any) -> Method:
    """Return the method of that name.

    Args:
        name: One of :data:`METHODS`.
        options: The method's own settings, such as ``adapters`` and ``seed``.

    Raises:
        OptionError: There is no such method, or it has no such option.

    Example:
        >>> make_method("random", adapters=0.5, seed=3).callbacks()
        []
    """
    known = _parameters_of(name)
    for option in sorted(set(options) - set(known)):
        raise OptionError(f"{name} has no option {option!r}{closest(option, sorted(known))}")
    for limit in LIMITS:
        check_limit(limit, options.get(limit))
    check_arguments(_build_of(name), options)
    return _build_of(name)(**options)


def entry_of(name: str) -> MethodEntry:
    """Return the registry's line of that name.

    Raises:
        OptionError: There is none; the text names the closest.
    """
    for entry in METHODS:
        if entry.name == name:
            return entry
    if name in _ELSEWHERE:
        raise OptionError(f"method={name!r} is none: {_ELSEWHERE[name]}")
    names = [entry.name for entry in METHODS]
    raise OptionError(f"method={name!r} is unknown{closest(name, names)}; there are {', '.join(names)}")


def options_of(name: str) -> set[str]:
    """Return the names of a method's own settings.

    Raises:
        OptionError: There is no such method.

    Example:
        >>> sorted(options_of("random"))
        ['adapters', 'parameters', 'seed']
    """
    return set(_parameters_of(name))


def _parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_build_of(name)).parameters


def _build_of(name: str) -> Callable[..., Method]:
    return import_module(f"weightlora.methods.{entry_of(name).name}").build


def __getattr__(attribute: str) -> Any:
    if attribute == "Method":  # the protocol's file needs torch's types, the registry does not
        return import_module("weightlora.methods.base").Method
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
