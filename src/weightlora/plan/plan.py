"""The plan: which sites carry an adapter, of which rank, and how they were selected. Frozen; JSON on disk; no torch.

select → plan → ``LoraConfig`` → any trainer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.plan._data import PlanData, PlannedSite, library_versions, sites_fingerprint
from weightlora.plan._screen import Alternative, alternatives, headline, rows_html, summary
from weightlora.plan.attach import attach_plan, lora_config_of, require_adapters, require_sites
from weightlora.plan.card import write_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

__all__ = ["AdapterPlan", "PlannedSite", "library_versions", "sites_fingerprint"]


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
