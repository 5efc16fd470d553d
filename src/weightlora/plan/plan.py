"""The plan: which sites carry an adapter, of which rank, and how they were selected. Frozen; JSON on disk; no torch.

select → plan → ``LoraConfig`` → any trainer

A plan is made from a model's sites and the names of those to keep, or from the directory of a PEFT LoRA adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from safetensors import SafetensorError, safe_open

from weightlora.errors import OptionError, PlanError
from weightlora.model.sites import Site, TargetParameter, rank_and_alpha
from weightlora.plan._data import PlanData, PlannedSite, library_versions, sites_fingerprint, whole_or_float
from weightlora.plan._schema import MOST_ALPHA, Alpha, Rank, text_fault
from weightlora.plan._screen import Alternative, alternatives, headline, rows_html, summary
from weightlora.plan.attach import attach_plan, config_fields, lora_config_of, require_adapters, require_sites
from weightlora.plan.card import write_adapter
from weightlora.validation import first_fault

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

__all__ = ["AdapterPlan", "PlannedSite", "library_versions", "make_plan", "read_adapter", "sites_fingerprint"]


@dataclass(frozen=True, repr=False)
class AdapterPlan(PlanData):
    """Which sites carry an adapter and of which rank, with the record of the selection.

    :func:`weightlora.select` makes it, :meth:`load` reads it, :meth:`attach` and :meth:`to_lora_config` use it.

    Example:
        >>> from weightlora.model.sites import Site
        >>> plan = AdapterPlan((
        ...     PlannedSite(Site("a", 8, 8), 4, 8, r=4, alpha=8, score=2.0),
        ...     PlannedSite(Site("b", 8, 8), 4, 8, r=0, alpha=8, score=1.0),
        ... ))
        >>> plan.names, plan.to_lora_config().r
        (('a',), 4)
    """

    def __str__(self) -> str:
        """Return one screen: what is kept, by which rule, where, and how to go on."""
        return summary(self)

    def _repr_html_(self) -> str:
        """Return the same for a notebook, with the heat map."""
        return rows_html(self)

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The plan, plain LoRA, and what else the same money buys, with what each costs.

        Example:
            >>> from weightlora.model.sites import Site
            >>> plan = AdapterPlan((PlannedSite(Site("a", 8, 8), 4, 8, r=1, alpha=2, score=0.0),))
            >>> [(row.name, row.parameters) for row in plan.alternatives]
            [('this plan', 16), ('LoRA, rank 4', 64), ('LoRA, rank 1', 16)]
        """
        return alternatives(self)

    def __repr__(self) -> str:
        """Return one line."""
        return f"AdapterPlan({headline(self)}, rule={self.rule!r:.60})"

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
        return lora_config_of(self, overrides)

    def attach(self, model: nn.Module, **overrides: Any) -> PeftModel:
        """Return a PEFT model with freshly initialised, stock adapters on exactly the planned sites of ``model``.

        Like ``get_peft_model(model, plan.to_lora_config())``, and:

        - the plan is checked against the model before and after;
        - the saved config holds the full names. PEFT shortens lists of 20 or more names to suffixes, which can match
          more modules in another model;
        - :func:`weightlora.model.checkpointing.shorten_backward` is called, for models with gradient checkpointing;
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
        return attach_plan(self, model, overrides)

    def check_sites(self, model: nn.Module) -> None:
        """Raise unless every candidate of the plan is a linear layer of ``model`` with the same shape.

        Every target parameter must be there, too.

        Raises:
            PlanMismatchError: With the sites that do not match.
        """
        require_sites(self, model)

    def check(self, model: nn.Module, adapter: str = "default") -> None:
        """Raise unless exactly the planned sites and target parameters carry ``adapter``, each with its planned rank.

        Args:
            model: A PEFT model, or a model that PEFT has put LoRA layers into.
            adapter: The adapter's name.

        Raises:
            PlanMismatchError: With the sites that do not match.
        """
        require_adapters(self, model, adapter)

    def save_adapter(self, model: PeftModel, path: str | Path) -> None:
        """Write ``model``'s adapter as a stock PEFT directory with ``plan.json``; a failed write leaves no directory.

        The model card shows the plan, as a picture too where matplotlib is installed (``plan.png``). The directory can
        be uploaded as it is: ``HfApi().upload_folder(repo_id=..., folder_path=path)``. What an earlier call wrote to
        ``path`` is replaced; a folder with anything else is refused.

        Raises:
            PlanMismatchError: The model does not carry the plan.
            OutputError: The folder holds other files, or cannot be written.
        """
        write_adapter(self, model, path)


# -- plans from a config and from an adapter ---------------------------------------------------------------------------


def make_plan(
    sites: Sequence[Site],
    lora: LoraConfig,
    kept: Sequence[str],
    scores: Sequence[float] | None = None,
    errors: Sequence[float] = (),
    ranks: Mapping[str, int] | None = None,
    alpha_by: Literal["ratio", "least"] = "ratio",
    target_parameters: Sequence[TargetParameter] | None = None,
    **record: Any,
) -> AdapterPlan:
    """Build the plan that keeps ``kept`` of ``sites`` at the ranks ``lora`` gives them, or at ``ranks``.

    Args:
        sites: All candidates, sorted by name.
        lora: The user's config; its rank and alpha patterns are applied.
        kept: Names of the sites that carry an adapter.
        scores: One per site; None where sites were not scored.
        errors: Standard error of each score; empty where they have none.
        ranks: Rank of each kept site, where it is not ``lora``'s.
        alpha_by: What keeps alpha/r at another rank: ``"ratio"`` each site's alpha; ``"least"`` one factor for all, the
            least share of its rank that a kept site has. Then equal alphas stay equal, and a site of a rank more is
            scaled a little less. rsLoRA, whose scaling is alpha/√r, keeps alpha.
        target_parameters: What ``lora`` adapts besides layers, as :func:`weightlora.find_sites` found it; None is the
            answer of a method that trains layers only.
        record: Further fields of :class:`AdapterPlan`.

    Raises:
        OptionError: ``lora`` has ``target_parameters``, and the method that makes the plan trains layers only.
    """
    if lora.target_parameters and target_parameters is None:
        asked, rule = sorted(lora.target_parameters)[:2], record.get("rule", "this method")
        raise OptionError(
            f"target_parameters={asked}: {rule} adapts layers only; leave the parameters out, or take the method "
            "weightlora, random or lora"
        )
    keep = set(kept)
    user = [rank_and_alpha(lora, site.name) for site in sites]
    planned = [
        (r if ranks is None else ranks[site.name]) if site.name in keep else 0
        for site, (r, _) in zip(sites, user, strict=True)
    ]
    least = min((Fraction(own, r) for own, (r, _) in zip(planned, user, strict=True) if own), default=Fraction(1))
    entries: list[PlannedSite] = []
    known = zip(sites, user, planned, scores or [0.0] * len(sites), errors or [None] * len(sites), strict=True)
    for site, (r, alpha), own, score, error in known:
        grown = least if alpha_by == "least" else Fraction(own, r)
        changed = alpha if own == 0 or lora.use_rslora else whole_or_float(Fraction(alpha) * grown)
        entries.append(PlannedSite(site, r, alpha, r=own, alpha=changed, score=score, score_error=error))
    besides = tuple(target_parameters or ())
    return AdapterPlan(tuple(entries), lora=config_fields(lora), target_parameters=besides, **record)


#: Files that PEFT writes: the configuration and the tensors.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_adapter(folder: str | Path) -> AdapterPlan:
    """Return the adapter's ``plan.json``, or a plan of its tensors, in which all sites are kept and none is scored.

    Args:
        folder: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        PlanError: The directory holds no LoRA adapter, or cannot be read.
    """
    folder = Path(folder)
    if (folder / "plan.json").exists():
        return AdapterPlan.load(folder / "plan.json")
    config = adapter_config(folder)
    shapes = {key: shape for key, shape in tensor_shapes(folder).items() if len(shape) == 2}
    alpha, base = config.get("lora_alpha", 8), config.get("base_model_name_or_path")
    if first_fault(Alpha, alpha):
        raise PlanError(f"{folder} has lora_alpha={alpha!r:.40}; give a positive number up to {MOST_ALPHA:g}")
    _require_name(folder, base)
    entries: list[PlannedSite] = []
    for key, (r, in_features) in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match:
            out_features, columns = shapes.get(f"base_model.model.{match.group(1)}.lora_B.weight", (0, 0))
            if columns != r or min(r, in_features, out_features) < 1:
                raise PlanError(
                    f"{folder} is damaged: {key} has shape {(r, in_features)}, its lora_B {(out_features, columns)}"
                )
            site = Site(match.group(1), in_features, out_features)
            entries.append(PlannedSite(site, r, alpha, r=r, alpha=alpha, score=0.0))
    if not entries:
        raise PlanError(f"{folder} holds no LoRA matrices; its tensors are named {', '.join(list(shapes)[:3])}")
    entries.sort(key=lambda entry: entry.site.name)
    lora = {field: True for field in ("use_dora", "lora_bias") if config.get(field) is True}
    return AdapterPlan(tuple(entries), lora=lora, rule="adapter", base_model=base)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's ``adapter_config.json``.

    Raises:
        PlanError: It is missing or holds no mapping.
    """
    try:
        config: Any = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{folder} is not an adapter directory: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{folder} is not an adapter directory: {ADAPTER_FILES[0]} holds {config!r:.40}")
    return cast("dict[str, Any]", config)


def require_lora(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise where an adapter's configuration is not LoRA's, or PEFT could not use its ranks, alphas or base model.

    Raises:
        PlanError: With the field and its value.
    """
    fault = text_fault(config)
    if fault:
        raise PlanError(f"{folder} is damaged: {ADAPTER_FILES[0]}: {fault}")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if first_fault(Rank, r) or first_fault(Alpha, alpha):
        raise PlanError(
            f"{folder} has r={r!r:.40} and lora_alpha={alpha!r:.40}; give a whole number and a positive one"
        )
    if config.get("peft_type") not in (None, "LORA"):
        raise PlanError(f"{folder} holds an adapter of peft_type={config['peft_type']!r:.40}; only LORA can be read")
    _require_name(folder, config.get("base_model_name_or_path"))
    for field, kind in (("rank_pattern", dict[str, Rank]), ("alpha_pattern", dict[str, Alpha])):
        patterns: Any = config.get(field) or {}
        if first_fault(kind, patterns):
            raise PlanError(f"{folder} has {field}={patterns!r:.60}; give a mapping of layer names to positive numbers")


def _require_name(folder: Path, base: Any) -> None:
    if not isinstance(base, str | None) or text_fault(base):
        raise PlanError(f"{folder} has base_model_name_or_path={base!r:.40}; give a name, a path or null")


def tensor_shapes(folder: Path, file: str = ADAPTER_FILES[1]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter, sorted by name; only the file's header is read.

    Raises:
        PlanError: The file is missing or damaged.
    """
    return {key: shape for key, (_, shape) in tensor_headers(folder, file).items()}


def tensor_headers(folder: Path, file: str = ADAPTER_FILES[1]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type of numbers, such as ``"F32"``, and shape of every tensor of an adapter, as :func:`tensor_shapes`."""
    try:
        with safe_open(folder / file, framework="numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in sorted(tensors.keys())}
            return {key: (own.get_dtype(), tuple(own.get_shape())) for key, own in slices.items()}
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{folder} is not an adapter directory: {error}") from error
