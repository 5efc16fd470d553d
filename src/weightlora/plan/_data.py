"""The data of a plan: sites, ranks and scores, how they were selected, and the file that they are in. No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightlora.errors import OptionError, PlanError
from weightlora.model.sites import Site, TargetParameter
from weightlora.plan._schema import ENTRY_KEYS, PLAN_KEYS, read_plan_file, write_plan_file
from weightlora.plan.budget import expanded_ranks
from weightlora.plan.limits import Limits

if TYPE_CHECKING:
    from typing_extensions import Self


#: Below this share of LoRA's parameters a plan of whole layers wants a higher rate.
_FEW = 0.15


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a selection, read without importing them."""
    return {name: version(name) for name in ("weightlora", "torch", "transformers", "peft")}


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


@dataclass(frozen=True, repr=False)
class PlanData:
    """What an :class:`weightlora.AdapterPlan` holds; that class adds what is done with a model, and how it is shown."""

    entries: tuple[PlannedSite, ...]
    """All candidates, sorted by name."""
    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The user's ``LoraConfig`` where it differs from PEFT's defaults, as JSON; ranks and names are in ``entries``."""
    rule: str = "lora"
    """How the sites were chosen: ``"first_order"``, ``"paper"``, ``"random"`` or ``"lora"`` (all)."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The selection's settings: limits, steps (T) and those of its rule."""
    seed: int = 0
    history: tuple[tuple[float, ...], ...] = ()
    """A row per scoring step, in the order of ``entries``: the mean gain so far (``"first_order"``) or the gates ω."""
    base_model: str | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    target_parameters: tuple[TargetParameter, ...] = ()
    """Parameters that carry an adapter whatever is selected, such as fused experts; :meth:`expand` ignores them."""
    question: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    """What :func:`weightlora.select_for` was asked: a later start in the same folder that asks something else does not
    get this plan. Empty where a plan was made in another way."""

    spent: Mapping[str, int] = field(default_factory=dict[str, int], compare=False)
    """Steps of scoring and measuring, ``scoring_steps``, and of the training, ``total_steps``, where they are known."""

    @property
    def learning_rate_factor(self) -> float:
        """The factor of LoRA's learning rate that suits this plan, from 1 to 2 (measured: docs/lab/choice.md).

        Lower ranks at LoRA's alpha/r want LoRA's rate at half of its parameters, and twice that at a quarter or less.
        :func:`weightlora.select_for` sets the trainer's rate by it. Few whole layers want about twice the rate. Lower
        ranks of rsLoRA, whose scaling grows, want LoRA's.
        """
        share = self.parameters / self.lora_parameters
        if any(0 < entry.r < entry.lora_r for entry in self.entries):
            return 1.0 if self.lora.get("use_rslora") else round(min(max(0.5 / share, 1.0), 2.0), 1)
        return 2.0 if share < _FEW else 1.0

    @property
    def step_share(self) -> float:
        """The share of the user's training steps that this plan is made for, in (0, 1]; below 1 with ``time`` alone.

        :func:`weightlora.select_for` sets the trainer's ``max_steps`` by it.
        """
        return float(self.options.get("step_share", 1.0))

    @property
    def batch_parts(self) -> int:
        """How many micro-batches take the place of one of the user's, so that memory suffices; above 1 with ``memory``.

        :func:`weightlora.select_for` sets the trainer's batch size and accumulation by it.
        """
        return int(self.options.get("batch_parts", 1))

    def steps_of(self, total: int) -> int:
        """Return how many of a training's steps this plan is made for, at least one."""
        return max(Limits(time=self.step_share).time_of(total) or 0, 1)

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

    def expand(self, budget: Literal["ranks", "parameters"] = "ranks") -> Self:
        """Return WeightLoRA+: the same sites at the ranks of all (paper, section 2.2).

        Alpha grows with the rank, so that the scaling alpha/r stays. Under rsLoRA, whose scaling is alpha/√r, alpha
        stays.

        Args:
            budget: ``"ranks"``, the paper: r becomes r·n/K, 2r at K = n/2. Kept layers are often wide, so that this can
                cost more parameters than r on all sites. ``"parameters"`` grows to LoRA's parameters at most.

        Example:
            >>> from weightlora import AdapterPlan
            >>> plan = AdapterPlan((
            ...     PlannedSite(Site("a", 8, 8), 4, 8, r=4, alpha=8, score=2.0),
            ...     PlannedSite(Site("b", 8, 8), 4, 8, r=0, alpha=8, score=1.0),
            ... ))
            >>> plan.expand().ranks, plan.expand().to_lora_config().lora_alpha
            ({'a': 8, 'b': 0}, 16)
        """
        if budget not in ("ranks", "parameters"):
            raise OptionError(f"budget={budget!r} is not allowed: give 'ranks' (the paper) or 'parameters'")
        if "expand" in self.options:  # what rounding left of the budget is less than one more rank on each kept site
            return self
        scales = not self.lora.get("use_rslora", False)
        whole = [
            Fraction(e.lora_alpha) / e.lora_r for e in self.entries if e.r > 0 and float(e.lora_alpha).is_integer()
        ]
        step = math.lcm(*(ratio.denominator for ratio in whole)) if scales else 1
        ranks = expanded_ranks(
            [entry.lora_r for entry in self.entries],
            [entry.r for entry in self.entries],
            [entry.site.parameters(1) for entry in self.entries] if budget == "parameters" else None,
            step=step,
        )
        entries = tuple(
            replace(e, r=r, alpha=whole_or_float(Fraction(e.lora_alpha) * r / e.lora_r) if scales and r else e.alpha)
            for e, r in zip(self.entries, ranks, strict=True)
        )
        return replace(self, entries=entries, options={**self.options, "expand": budget})

    def jaccard(self, other: PlanData) -> float:
        """Return the Jaccard similarity |A∩B| / |A∪B| of the kept sites, from 0 (disjoint) to 1 (equal)."""
        mine, theirs = set(self.names), set(other.names)
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a failed write leaves no file.

        Raises:
            OutputError: The folder cannot be written.
        """
        rows = [{**asdict(e.site), **{key: getattr(e, key) for key in ENTRY_KEYS}} for e in self.entries]
        top = {"fingerprint": self.fingerprint, **{key: getattr(self, key) for key in PLAN_KEYS}}
        besides = {"target_parameters": [asdict(each) for each in self.target_parameters]} if self._besides else {}
        asked = {"question": self.question} if self.question else {}
        asked |= {"spent": self.spent} if self.spent else {}
        write_plan_file(path, {**top, "sites": rows, "history": self.history, **besides, **asked})

    @classmethod
    def load(cls, path: str | Path) -> Self:
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
            spent=data.get("spent", {}),
            **{key: data[key] for key in PLAN_KEYS},
        )
        if data["fingerprint"] != plan.fingerprint:
            raise PlanError(f"{path} was edited: its sites do not match its fingerprint; select anew")
        return plan


def sites_fingerprint(sites: Sequence[Site]) -> str:
    """Return the SHA-256 of the names and shapes of sites, in the order of their names."""
    text = "\n".join(f"{site.name} {site.in_features} {site.out_features}" for site in sites)
    return hashlib.sha256(text.encode()).hexdigest()


def whole_or_float(value: Fraction | float) -> float:
    """An int where the value is whole (Ollama reads lora_alpha as one), else a float."""
    return int(value) if float(value).is_integer() else float(value)
