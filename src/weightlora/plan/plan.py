"""The plan: which sites carry an adapter, of which rank, and how that was found. Frozen, JSON on disk, no torch.

select → plan → ``LoraConfig`` → any trainer
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightlora.errors import OptionError, PlanError, PlanMismatchError
from weightlora.files import whole_folder
from weightlora.model.sites import Site, rank_and_alpha, trained_modules
from weightlora.plan._schema import ENTRY_KEYS, PLAN_KEYS, read_plan_file, write_plan_file
from weightlora.plan.budget import expanded_ranks

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

#: Fields of a LoraConfig that the plan decides; all others are the user's and pass through unchanged.
_PLANNED_FIELDS = ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
#: Fields that PEFT fills in by itself when a config is made, attached or saved.
_PEFT_FIELDS = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


@dataclass(frozen=True)
class PlannedSite:
    """A candidate site: what plain LoRA would put there, what was heard, and what the plan puts there."""

    site: Site
    lora_r: int
    """Rank under plain LoRA on all sites: the budget that is spent."""
    lora_alpha: float
    """``lora_alpha`` under plain LoRA."""
    r: int
    """Planned rank; 0 = no adapter."""
    alpha: float
    """Planned ``lora_alpha``."""
    score: float
    """Higher = keep; ω after StoIHT, the gate's first-order gain, or 0 where nothing was heard."""


@dataclass(frozen=True)
class PlanDifference:
    """What changes from one plan to another; see :meth:`AdapterPlan.diff`."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed_ranks: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class AdapterPlan:
    """Site → rank, with the record of the selection that led there.

    Made by :func:`weightlora.select`; read with :meth:`load`; used through :meth:`to_lora_config` or :meth:`attach`.
    """

    entries: tuple[PlannedSite, ...]
    """All candidates, sorted by name."""
    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The user's ``LoraConfig`` where it differs from PEFT's defaults, as JSON; ranks and names are in ``entries``."""
    rule: str = "lora"
    """How the sites were chosen: ``"first_order"``, ``"stoiht"``, ``"random"`` or ``"lora"`` (all)."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The rule's settings: keep, steps (T), head_steps, threshold_every, ..."""
    seed: int = 0
    history: tuple[tuple[float, ...], ...] = ()
    """The gates after each warm-up step, each row in the order of ``entries``; for ``"first_order"`` the gain as
    averaged so far."""
    base_model: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())

    @property
    def names(self) -> tuple[str, ...]:
        """The kept sites, sorted."""
        return tuple(entry.site.name for entry in self.entries if entry.r > 0)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every candidate by name; 0 = no adapter."""
        return {entry.site.name: entry.r for entry in self.entries}

    @property
    def scores(self) -> dict[str, float]:
        """Score of every candidate by name; higher = keep."""
        return {entry.site.name: entry.score for entry in self.entries}

    @property
    def parameters(self) -> int:
        """Trainable parameters of the planned adapters: Σ rᵢ·(inᵢ + outᵢ), and DoRA's outᵢ."""
        magnitudes = sum(entry.site.out_features for entry in self.entries if entry.r > 0 and self.lora.get("use_dora"))
        return sum(entry.site.parameters(entry.r) for entry in self.entries) + magnitudes

    @property
    def lora_parameters(self) -> int:
        """Trainable parameters of plain LoRA on all candidates: the budget."""
        return sum(entry.site.parameters(entry.lora_r) for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the candidates' names and shapes: equal for models that the plan fits."""
        return _fingerprint([entry.site for entry in self.entries])

    def expand(self, *, alpha: Literal["scale", "keep"] = "scale") -> AdapterPlan:
        """Return WeightLoRA+: the same sites at the rank that spends plain LoRA's whole budget (paper, section 2.2).

        With equal ranks r that is r·n/K, lowered until neither Σ ranks nor the parameters exceed plain LoRA's: kept
        layers are often wide, and 2r on them would cost more than r on all.

        Args:
            alpha: ``"scale"`` lets alpha grow with the rank, so that alpha/r, the adapter's strength, stays;
                ``"keep"`` leaves alpha. rsLoRA, whose strength alpha/√r needs no correction, always keeps it.

        Example:
            >>> plan = AdapterPlan((
            ...     PlannedSite(Site("a", 8, 8), 4, 8, r=4, alpha=8, score=2.0),
            ...     PlannedSite(Site("b", 8, 8), 4, 8, r=0, alpha=8, score=1.0),
            ... ))
            >>> plan.expand().ranks, plan.expand().to_lora_config().lora_alpha
            ({'a': 8, 'b': 0}, 16)
        """
        if alpha not in ("scale", "keep"):
            raise OptionError(f"alpha={alpha!r} is not allowed: give 'scale' or 'keep'")
        scales = alpha == "scale" and not self.lora.get("use_rslora", False)
        whole = [Fraction(e.lora_alpha) / e.lora_r for e in self.entries if e.r > 0 and _is_whole(e.lora_alpha)]
        step = math.lcm(*(ratio.denominator for ratio in whole)) if scales else 1
        ranks = expanded_ranks(
            [entry.lora_r for entry in self.entries],
            [entry.r > 0 for entry in self.entries],
            [entry.site.parameters(1) for entry in self.entries],
            step=step,
        )
        entries = tuple(
            replace(e, r=r, alpha=_number(Fraction(e.lora_alpha) * r / e.lora_r) if scales and r else e.lora_alpha)
            for e, r in zip(self.entries, ranks, strict=True)
        )
        return replace(self, entries=entries, options={**self.options, "expand": alpha})

    def to_lora_config(self, **overrides: Any) -> LoraConfig:
        """Return the stock PEFT config of the planned adapters; every other field is the user's own.

        ``target_modules`` is the sorted list of full names. Where all ranks are equal there is one ``r``, one
        ``lora_alpha`` and no pattern, which every runtime reads; otherwise the patterns hold one anchored, escaped
        name each.

        Args:
            overrides: Fields of ``LoraConfig`` to change, but for those that are the plan.

        Raises:
            OptionError: An override would change the plan itself.
        """
        from peft import LoraConfig

        taken = sorted(set(overrides) & set(_PLANNED_FIELDS))
        if taken:
            raise OptionError(f"{', '.join(taken)} come from the plan; change them with select(keep=...) or expand()")
        kept = [entry for entry in self.entries if entry.r > 0]
        if not kept:
            raise PlanError("the plan keeps no site, so there is no LoraConfig of it")
        uniform = len({(entry.r, entry.alpha) for entry in kept}) == 1
        keys = ["^" + re.escape(entry.site.name) for entry in kept]
        fields = deepcopy({**self.lora, **overrides})  # PEFT adds the task's heads to modules_to_save in place
        unknown = sorted(set(fields) - set(inspect.signature(LoraConfig).parameters))
        if unknown:
            raise PlanError(f"this PEFT's LoraConfig has no field {', '.join(unknown)}; update PEFT, or select anew")
        config = LoraConfig(
            target_modules=list(self.names),
            r=kept[0].r,
            lora_alpha=_number(kept[0].alpha),  # pyright: ignore[reportArgumentType]  # PEFT takes floats as well
            rank_pattern={} if uniform else {k: e.r for k, e in zip(keys, kept, strict=True)},
            alpha_pattern={} if uniform else {k: _number(e.alpha) for k, e in zip(keys, kept, strict=True)},
            **fields,
        )
        config.exclude_modules = self._exclusions(config.exclude_modules)
        config.target_modules = list(self.names)  # PEFT made a set of it, which it would save in random order
        return config

    def attach(self, model: nn.Module, **overrides: Any) -> PeftModel:
        """Put freshly initialised, stock PEFT adapters on exactly the planned sites of ``model``.

        The same as ``get_peft_model(model, plan.to_lora_config())`` with two things settled: the plan is checked
        against the model before and after, and the config that is saved holds the full sorted names (PEFT shortens
        lists of 20 or more names to suffixes, which can match more modules in another model). Where the model has
        gradient checkpointing on, :func:`weightlora.shorten_backward` is called.

        Raises:
            PlanMismatchError: The model lacks planned sites, or has them in other shapes.
        """
        from peft import get_peft_model

        from weightlora.model.checkpointing import shorten_backward

        self.check_sites(model)
        peft_model = get_peft_model(model, self.to_lora_config(**overrides))  # pyright: ignore[reportArgumentType]
        peft_model.peft_config["default"].target_modules = list(self.names)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self.check(peft_model)
        except PlanMismatchError:
            peft_model.base_model.unload()  # pyright: ignore[reportCallIssue]
            raise
        return shorten_backward(peft_model)

    def check_sites(self, model: nn.Module) -> None:
        """Raise unless every candidate of the plan is a linear layer of ``model`` with the same shape.

        Raises:
            PlanMismatchError: With the sites that do not match.
        """
        from weightlora.model.sites import linear_sites

        present = {site.name: site for site in linear_sites(model)}
        faults = [
            f"{e.site.name}: not in the model"
            if e.site.name not in present
            else f"{e.site.name}: {_shape(present[e.site.name])} in the model, {_shape(e.site)} in the plan"
            for e in self.entries
            if present.get(e.site.name) != e.site
        ]
        _raise_faults(faults, f"the plan was made for another model ({self.base_model or 'unnamed'})")

    def check(self, model: nn.Module, adapter: str = "default") -> None:
        """Raise unless exactly the planned sites of ``model`` carry ``adapter``, each with its planned rank.

        Args:
            model: A PEFT model, or a model that PEFT has put LoRA layers into.
            adapter: The adapter's name.

        Raises:
            PlanMismatchError: With the sites that do not match.
        """
        from weightlora.model.layers import adapter_layers

        self.check_sites(model)
        layers: dict[str, Any] = dict(adapter_layers(model, adapter))
        found = {name: layer.r[adapter] for name, layer in layers.items()}
        planned = {name: self.ranks[name] for name in self.names}
        faults = [f"{name}: no adapter, planned rank {planned[name]}" for name in planned if name not in found]
        faults += [f"{name}: rank {found[name]}, not planned" for name in found if name not in planned]
        both = [name for name in planned if name in found]
        faults += [f"{n}: rank {found[n]}, planned {planned[n]}" for n in both if found[n] != planned[n]]
        _raise_faults(faults, "the model does not carry the plan (use plan.attach(model))")

    def jaccard(self, other: AdapterPlan) -> float:
        """Return |A∩B| / |A∪B| of the kept sites, from 0 (disjoint) to 1 (the same)."""
        mine, theirs = set(self.names), set(other.names)
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def diff(self, other: AdapterPlan) -> PlanDifference:
        """Return what ``other`` adds, removes and re-ranks, names sorted."""
        mine, theirs = self.ranks, other.ranks
        both = [name for name in self.names if theirs.get(name, 0) > 0]
        return PlanDifference(
            added=tuple(name for name in other.names if mine.get(name, 0) == 0),
            removed=tuple(name for name in self.names if theirs.get(name, 0) == 0),
            changed_ranks={name: (mine[name], theirs[name]) for name in both if mine[name] != theirs[name]},
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            OutputError: The folder cannot be written.
        """
        rows = [{**asdict(e.site), **{key: getattr(e, key) for key in ENTRY_KEYS}} for e in self.entries]
        top = {"fingerprint": self.fingerprint, **{key: getattr(self, key) for key in PLAN_KEYS}}
        write_plan_file(path, {**top, "sites": rows, "history": self.history})

    @classmethod
    def load(cls, path: str | Path) -> AdapterPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: The file is missing, truncated, no JSON, of an unknown schema, or contradicts itself.
        """
        data = read_plan_file(path)
        plan = cls(
            entries=tuple(
                PlannedSite(
                    Site(row["name"], row["in_features"], row["out_features"]), **{k: row[k] for k in ENTRY_KEYS}
                )
                for row in data["sites"]
            ),
            history=tuple(tuple(row) for row in data["history"]),
            **{key: data[key] for key in PLAN_KEYS},
        )
        if data["fingerprint"] != plan.fingerprint:
            raise PlanError(f"{path} was edited: its sites do not match its fingerprint; write it anew with select()")
        return plan

    def save_adapter(self, model: PeftModel, path: str | Path) -> None:
        """Write ``model``'s adapter as a stock PEFT directory, ``plan.json`` beside it, whole or not at all.

        Raises:
            PlanMismatchError: The model does not carry the plan.
            OutputError: The folder cannot be written.
        """
        from safetensors import SafetensorError

        self.check(model)
        with whole_folder(path) as draft:
            try:
                model.save_pretrained(str(draft))
            except SafetensorError as error:  # its word for a full disk
                raise OSError(str(error)) from error
            self.save(draft / "plan.json")

    def _exclusions(self, users: str | Collection[str] | None) -> str | list[str] | None:
        """The user's ``exclude_modules``, and the dropped sites that PEFT would reach by a kept name.

        PEFT reads a listed name as an ending: a kept ``proj`` would also adapt a dropped ``inner.proj``.
        """
        ends = tuple("." + name for name in self.names)
        reached = [entry.site.name for entry in self.entries if entry.r == 0 and entry.site.name.endswith(ends)]
        if isinstance(users, str):
            return "|".join([f"(?:{users})", *map(re.escape, reached)]) if reached else users
        return sorted({*(users or ()), *reached}) or None


def make_plan(
    sites: Sequence[Site], lora: LoraConfig, kept: Sequence[str], scores: Sequence[float] | None = None, **record: Any
) -> AdapterPlan:
    """Build the plan that keeps ``kept`` of ``sites`` at the ranks ``lora`` gives them.

    Args:
        sites: All candidates, sorted by name.
        lora: The user's config; its rank and alpha patterns are applied.
        kept: Names of the sites that carry an adapter.
        scores: One a site; None where nothing was heard.
        record: Further fields of :class:`AdapterPlan`.
    """
    keep = set(kept)
    entries: list[PlannedSite] = []
    for site, score in zip(sites, scores or [0.0] * len(sites), strict=True):
        r, alpha = rank_and_alpha(lora, site.name)
        entries.append(PlannedSite(site, r, alpha, r=r if site.name in keep else 0, alpha=alpha, score=score))
    return AdapterPlan(tuple(entries), lora=config_fields(lora), **record)


def base_model_name(model: nn.Module) -> str | None:
    """The name or path that a transformers model was loaded from; None where it has none."""
    config: Any = vars(model).get("config")
    return getattr(config, "name_or_path", None) or None


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a selection, read without importing them."""
    return {name: version(name) for name in ("weightlora", "torch", "transformers", "peft")}


def config_fields(lora: LoraConfig) -> dict[str, Any]:
    """The fields of ``lora`` that a plan passes through, as JSON, where they differ from PEFT's defaults."""
    from peft import LoraConfig

    default = LoraConfig().to_dict()
    mine = {k: v for k, v in lora.to_dict().items() if k not in (*_PLANNED_FIELDS, *_PEFT_FIELDS) and v != default[k]}
    if "modules_to_save" in mine:  # PEFT adds the task's heads to the list each time that it attaches adapters
        heads = trained_modules(replace(lora, modules_to_save=None))
        mine["modules_to_save"] = [name for name in mine["modules_to_save"] if name not in heads]
        mine = {k: v for k, v in mine.items() if k != "modules_to_save" or v}
    return json.loads(json.dumps(mine, default=sorted))  # sets become sorted lists, enums their text


def _fingerprint(sites: Sequence[Site]) -> str:
    text = "\n".join(f"{site.name} {site.in_features} {site.out_features}" for site in sites)
    return hashlib.sha256(text.encode()).hexdigest()


def _raise_faults(faults: Sequence[str], what: str) -> None:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise PlanMismatchError(f"{what}: {'; '.join(faults[:5])}{more}")


def _shape(site: Site) -> str:
    return f"{site.in_features}→{site.out_features}"


def _is_whole(number: float) -> bool:
    return float(number).is_integer()


def _number(value: Fraction | float) -> float:
    """An int where the value is whole (Ollama reads lora_alpha as one), else a float."""
    return int(value) if _is_whole(float(value)) else float(value)
