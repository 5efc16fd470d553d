"""The plan: which sites carry an adapter, of which rank, and how they were selected. Frozen; JSON on disk; no torch.

select → plan → ``LoraConfig`` → any trainer
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightlora.errors import OptionError, PlanError, PlanMismatchError
from weightlora.folders import whole_folder
from weightlora.model.parameters import TargetParameter
from weightlora.model.sites import Site
from weightlora.plan._match import require_adapters, require_parameters, require_room, require_sites
from weightlora.plan._schema import ENTRY_KEYS, PLAN_KEYS, read_plan_file, write_plan_file
from weightlora.plan.budget import expanded_ranks
from weightlora.plan.lora_config import planned_lora_config, whole_or_float
from weightlora.plan.provenance import library_versions, write_base_model_name

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


@dataclass(frozen=True)
class PlannedSite:
    """A candidate site: its rank and alpha under plain LoRA and in the plan, and its score."""

    site: Site
    lora_r: int
    """Rank under plain LoRA on all sites, which is the budget."""
    lora_alpha: float
    """``lora_alpha`` under plain LoRA."""
    r: int
    """Planned rank; 0 = no adapter."""
    alpha: float
    """Planned ``lora_alpha``."""
    score: float
    """Higher = keep: the gate's first-order gain, ω after StoIHT, or 0 where sites were not scored."""
    score_error: float | None = None
    """Standard error of the score over the batches; None where it has none."""


@dataclass(frozen=True)
class PlanDifference:
    """What changes from one plan to another; see :meth:`AdapterPlan.diff`."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed_ranks: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, repr=False)
class AdapterPlan:
    """Which sites carry an adapter and of which rank, with the record of the selection.

    :func:`weightlora.select` makes it, :meth:`load` reads it, :meth:`attach` and :meth:`to_lora_config` use it.
    """

    entries: tuple[PlannedSite, ...]
    """All candidates, sorted by name."""
    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The user's ``LoraConfig`` where it differs from PEFT's defaults, as JSON; ranks and names are in ``entries``."""
    rule: str = "lora"
    """How the sites were chosen: ``"first_order"``, ``"stoiht"``, ``"random"`` or ``"lora"`` (all)."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The selection's settings: keep, steps (T) and those of its rule."""
    seed: int = 0
    history: tuple[tuple[float, ...], ...] = ()
    """A row per warm-up step, in the order of ``entries``: the mean gain so far (``"first_order"``) or the gates ω."""
    base_model: str | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    target_parameters: tuple[TargetParameter, ...] = ()
    """Parameters that carry an adapter whatever is selected, such as fused experts; :meth:`expand` ignores them."""
    question: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    """What :func:`weightlora.select_for` was asked: a later start in the same folder that asks something else does not
    get this plan. Empty where a plan was made in another way."""

    def __str__(self) -> str:
        """Return one screen: what is kept, by which rule, where, and how to go on."""
        from weightlora.plan._summary import summary

        return summary(self)

    def __repr__(self) -> str:
        """Return one line."""
        from weightlora.plan._summary import headline

        return f"AdapterPlan({headline(self)}, rule={self.rule!r:.60})"

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
        """Trainable parameters of the planned adapters: Σ rᵢ·(inᵢ + outᵢ), and outᵢ for DoRA and for ``lora_bias``.

        The adapters of ``target_parameters`` are counted, too.
        """
        return sum(entry.site.parameters(entry.r, vectors=self._vectors) for entry in self.entries) + self._besides

    @property
    def lora_parameters(self) -> int:
        """Trainable parameters of the user's adapters on all candidates, the budget, and of ``target_parameters``."""
        return sum(self.lora_sizes) + self._besides

    @property
    def lora_sizes(self) -> tuple[int, ...]:
        """Trainable parameters of the user's adapter on each candidate, in the order of ``entries``."""
        return tuple(entry.site.parameters(entry.lora_r, vectors=self._vectors) for entry in self.entries)

    @property
    def _vectors(self) -> int:
        return bool(self.lora.get("use_dora")) + bool(self.lora.get("lora_bias"))

    @property
    def _besides(self) -> int:
        return sum(parameter.parameters for parameter in self.target_parameters)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the candidates' names and shapes: equal for models that the plan fits."""
        return sites_fingerprint([entry.site for entry in self.entries])

    def expand(self, *, alpha: Literal["scale", "keep"] = "scale") -> AdapterPlan:
        """Return WeightLoRA+: the same sites at the rank that spends plain LoRA's whole budget (paper, section 2.2).

        Equal ranks r become r·n/K, or less: neither Σ ranks nor the parameters exceed plain LoRA's. Kept layers are
        often wide, and 2r on them would cost more than r on all.

        Args:
            alpha: ``"scale"`` raises alpha with the rank, so that the scaling alpha/r stays; ``"keep"`` leaves alpha.
                rsLoRA, whose scaling is alpha/√r, always keeps it.

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
        if "expand" in self.options:  # what rounding left of the budget is less than one more rank on each kept site
            return self
        scales = alpha == "scale" and not self.lora.get("use_rslora", False)
        whole = [
            Fraction(e.lora_alpha) / e.lora_r for e in self.entries if e.r > 0 and float(e.lora_alpha).is_integer()
        ]
        step = math.lcm(*(ratio.denominator for ratio in whole)) if scales else 1
        ranks = expanded_ranks(
            [entry.lora_r for entry in self.entries],
            [entry.r for entry in self.entries],
            [entry.site.parameters(1) for entry in self.entries],
            step=step,
        )
        entries = tuple(
            replace(e, r=r, alpha=whole_or_float(Fraction(e.lora_alpha) * r / e.lora_r) if scales and r else e.alpha)
            for e, r in zip(self.entries, ranks, strict=True)
        )
        return replace(self, entries=entries, options={**self.options, "expand": alpha})

    def to_lora_config(self, **overrides: Any) -> LoraConfig:
        """Return the stock PEFT config of the planned adapters; every other field is the user's own.

        ``target_modules`` is the set of full names, saved as a sorted list. Equal ranks give one ``r`` and no
        ``rank_pattern``, equal alphas one ``lora_alpha`` and no ``alpha_pattern``, which every runtime reads. Otherwise
        the keys of a pattern are anchored, escaped names.

        Args:
            overrides: Fields of ``LoraConfig`` to change, except those that choose sites, ranks or alphas: the plan's.

        Raises:
            OptionError: An override would change the plan.
            PlanError: The plan keeps no site.
        """
        return planned_lora_config(self, overrides)

    def attach(self, model: nn.Module, **overrides: Any) -> PeftModel:
        """Return a PEFT model with freshly initialised, stock adapters on exactly the planned sites of ``model``.

        Like ``get_peft_model(model, plan.to_lora_config())``, and:

        - the plan is checked against the model before and after;
        - the saved config holds the full names. PEFT shortens lists of 20 or more names to suffixes, which can match
          more modules in another model;
        - :func:`weightlora.shorten_backward` is called, for models with gradient checkpointing;
        - after an error the model is as it was.

        Args:
            model: A base model, or a PEFT model whose only adapter is LoRA that was not trained yet: its adapter is
                replaced, and the same object is returned.
            overrides: As in :meth:`to_lora_config`.

        Raises:
            PlanMismatchError: The model lacks planned sites, or has them in other shapes.
            OptionError: An override would change the plan, the model carries adapters that would be lost, or the
                adapters start from weights that are offloaded.
            SiteError: The model is on the meta device, or was made under ``torch.inference_mode()``.
        """
        from peft import PeftModel, get_peft_model

        from weightlora.model.checkpointing import shorten_backward
        from weightlora.model.gathering import ready_for_adapters, why_not_attachable
        from weightlora.model.layers import take_tuner, unchecked_patterns, without_adapters
        from weightlora.model.restore import restored_on_error
        from weightlora.model.sites import trained_modules

        self.check_sites(model)
        config: Any = self.to_lora_config(**overrides)
        require_room(model, config)
        reason = why_not_attachable(model, config)
        if reason is not None:
            raise OptionError(reason)
        with restored_on_error(model):
            try:
                base = without_adapters(model)
                with unchecked_patterns(), ready_for_adapters(base, trained_modules(config)):
                    peft_model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
            except ValueError as error:  # other fields leave none of the names
                text = " ".join(str(error).split())
                raise PlanMismatchError(f"PEFT cannot attach the plan: {text}; change the fields in lora") from error
            peft_model.peft_config["default"].target_modules = set(self.names)  # pyright: ignore[reportAttributeAccessIssue]
            self.check(peft_model)
            if isinstance(model, PeftModel):
                take_tuner(model, peft_model)
        return shorten_backward(model if isinstance(model, PeftModel) else peft_model)

    def check_sites(self, model: nn.Module) -> None:
        """Raise unless every candidate of the plan is a linear layer of ``model`` with the same shape.

        Every target parameter must be there, too.

        Raises:
            PlanMismatchError: With the sites that do not match.
        """
        require_sites(model, [entry.site for entry in self.entries], self.base_model)
        require_parameters(model, self.target_parameters, self.base_model)

    def check(self, model: nn.Module, adapter: str = "default") -> None:
        """Raise unless exactly the planned sites and target parameters carry ``adapter``, each with its planned rank.

        Args:
            model: A PEFT model, or a model that PEFT has put LoRA layers into.
            adapter: The adapter's name.

        Raises:
            PlanMismatchError: With the sites that do not match.
        """
        self.check_sites(model)
        planned = {name: self.ranks[name] for name in self.names}
        require_adapters(model, planned | {each.name: each.r for each in self.target_parameters}, adapter)

    def jaccard(self, other: AdapterPlan) -> float:
        """Return the Jaccard similarity |A∩B| / |A∪B| of the kept sites, from 0 (disjoint) to 1 (equal)."""
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
        """Write the plan as JSON; a failed write leaves no file.

        Raises:
            OutputError: The folder cannot be written.
        """
        rows = [{**asdict(e.site), **{key: getattr(e, key) for key in ENTRY_KEYS}} for e in self.entries]
        top = {"fingerprint": self.fingerprint, **{key: getattr(self, key) for key in PLAN_KEYS}}
        besides = {"target_parameters": [asdict(each) for each in self.target_parameters]} if self._besides else {}
        asked = {"question": self.question} if self.question else {}
        write_plan_file(path, {**top, "sites": rows, "history": self.history, **besides, **asked})

    @classmethod
    def load(cls, path: str | Path) -> AdapterPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: The file is missing, truncated, not JSON, of an unknown schema, or inconsistent.
        """
        data = read_plan_file(path)
        plan = cls(
            entries=tuple(
                PlannedSite(
                    Site(row["name"], row["in_features"], row["out_features"]), **{k: row.get(k) for k in ENTRY_KEYS}
                )
                for row in data["sites"]
            ),
            history=tuple(tuple(row) for row in data["history"]),
            target_parameters=tuple(
                TargetParameter(row["name"], tuple(row["shape"]), row["r"], row["alpha"])
                for row in data.get("target_parameters", ())
            ),
            question=data.get("question", {}),
            **{key: data[key] for key in PLAN_KEYS},
        )
        if data["fingerprint"] != plan.fingerprint:
            raise PlanError(f"{path} was edited: its sites do not match its fingerprint; select anew")
        return plan

    def save_adapter(self, model: PeftModel, path: str | Path) -> None:
        """Write ``model``'s adapter as a stock PEFT directory with ``plan.json``; a failed write leaves no directory.

        The model card shows the plan, as a picture too where matplotlib is installed (``plan.png``). The directory can
        be uploaded as it is: ``HfApi().upload_folder(repo_id=..., folder_path=path)``. What an earlier call wrote to
        ``path`` is replaced; a folder with anything else is refused.

        Raises:
            PlanMismatchError: The model does not carry the plan.
            OutputError: The folder holds other files, or cannot be written.
        """
        from safetensors import SafetensorError

        from weightlora.plan.card import write_card

        self.check(model)
        with whole_folder(path, "save_adapter") as draft:
            try:
                model.save_pretrained(str(draft))
            except SafetensorError as error:  # raised when the disk is full
                raise OSError(str(error)) from error
            write_base_model_name(draft, model)
            self.save(draft / "plan.json")
            write_card(draft, self, model)


def sites_fingerprint(sites: Sequence[Site]) -> str:
    """Return the SHA-256 of the names and shapes of sites, in the order of their names."""
    text = "\n".join(f"{site.name} {site.in_features} {site.out_features}" for site in sites)
    return hashlib.sha256(text.encode()).hexdigest()
