"""EVA (Paischer et al. 2024, arXiv:2410.07170) with PEFT's SVD: ranks by the explained variance of the layers' inputs.

A_i holds the leading right singular vectors of the site's inputs. The n·r directions that explain the largest shares
of their inputs' variance, over all sites together, decide the ranks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from pydantic import Field
from torch import Tensor

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import PlanningMethod, PreparedPlan, plan_of
from weightlora.model.gathering import device_of, gathered
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import Site, find_sites, rank_and_alpha
from weightlora.selection.batches import Loss, TokenRows, counted_tokens, in_parts, model_loss, to_device
from weightlora.selection.stage import attach_plain_lora
from weightlora.validation import Count

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


@dataclass(kw_only=True, eq=False)
class Eva(PlanningMethod):
    """EVA.

    Args:
        rho: A site's rank is at most r·rho; 1 leaves all ranks as they are.
        tau: A direction has converged when its cosine with itself one batch before is at least this.
        whiten: Divide A's rows by the square roots of their singular values.
        adjust_alpha: Change alpha with the rank, so that alpha/r stays, as PEFT does by default. False is the
            authors' code. rsLoRA always keeps alpha.
        label_tokens: Use only the tokens of a language model that have a label, as PEFT does by default, unlike the
            paper.
        steps: Different batches; they are repeated until all directions have converged.
        most: The most batches, repetitions included.
        seed: Decides what is random in the model's own forward pass.
        loss_fn: As in :func:`weightlora.select`; only its forward pass is used.

    Raises:
        OptionError: ``most`` allows no repetition.
    """

    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    tau: Annotated[float, Field(gt=0, le=1)] = 0.99
    whiten: bool = False
    adjust_alpha: bool = True
    label_tokens: bool = False
    steps: Count = 20
    most: Count = 1000
    seed: int = 0
    loss_fn: Loss | None = None

    def __post_init__(self) -> None:
        if self.most <= self.steps:
            raise OptionError(f"most={self.most} is not allowed: give more than steps={self.steps}")

    def choose(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], _total_steps: int, /) -> PreparedPlan:
        """Give each site the rank that its directions explain, and start A with them."""
        lora = replace(lora, init_lora_weights=True, eva_config=None)
        found = find_sites(model, lora)
        _require_inputs(found.sites, lora, self.rho)
        directions = self._directions(model, lora, found.sites, batches)
        ranks = [len(directions[site.name]) for site in found.sites]
        options = {"rho": self.rho, "tau": self.tau, "whiten": self.whiten, "adjust_alpha": self.adjust_alpha}
        record = {"rule": "eva", "options": {**options, "steps": self.steps}, "seed": self.seed}
        plan = plan_of(model, lora, found, None, [float(r) for r in ranks], **record)
        grows = self.adjust_alpha and not lora.use_rslora
        entries = tuple(
            replace(e, r=r, alpha=e.lora_alpha * r / e.lora_r if grows and r else e.lora_alpha)
            for e, r in zip(plan.entries, ranks, strict=True)
        )
        return PreparedPlan(replace(plan, entries=entries), partial(_start_from, directions))

    def _directions(
        self, model: nn.Module, lora: LoraConfig, sites: Sequence[Site], batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        """Return the rows of A for each site, (r_i, in): PEFT's incremental SVD on the tokens of the batches."""
        shown = list(itertools.islice(batches, self.steps))
        if not shown:
            raise SelectionError("batches is empty; give at least one batch")
        # The longest names first: PEFT also applies a key to names that end with it.
        ranks = {re.escape(s.name): rank_and_alpha(lora, s.name)[0] for s in sorted(sites, key=lambda s: -len(s.name))}
        wanted = LoraConfig(
            r=lora.r,
            rank_pattern=ranks,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=self.rho, tau=self.tau, whiten=self.whiten),
        )
        with (
            untouched(model, seed=self.seed),
            redirect_stdout(StringIO()),  # PEFT prints a line for every activation that it skips
        ):
            attached = attach_plain_lora(model, lora, sites)
            with gathered(model), counted_tokens(model, labelled=self.label_tokens) as rows:
                found: dict[str, Tensor] = get_eva_state_dict(
                    attached,
                    [to_device(batch, device_of(model)) for batch in shown],
                    wanted,
                    forward_fn=partial(self._forward, itertools.count(1), model),
                    prepare_model_inputs_fn=_no_inputs,
                    prepare_layer_inputs_fn=partial(_tokens, rows),
                    show_progress_bar=False,
                )
        return {name.removeprefix("base_model.model."): rows.clone() for name, rows in found.items()}

    def _forward(self, passed: Iterator[int], model: nn.Module, _attached: nn.Module, batch: Any) -> None:
        """Run one batch through the model, and raise after ``most`` of them."""
        if next(passed) > self.most:
            raise SelectionError(
                f"the directions have not converged after {self.most} batches; give larger batches, lower tau or rho, "
                "or raise most"
            )
        for _ in in_parts(model, batch, self.loss_fn or model_loss):
            pass


build = Eva


@torch.no_grad()
def _start_from(directions: Mapping[str, Tensor], attached: PeftModel) -> None:
    """Set A of each site to its directions."""
    layers: dict[str, Any] = dict(lora_layers(attached))
    for name, layer in layers.items():
        layer.lora_A["default"].weight.copy_(directions[name])


def _tokens(rows: TokenRows, given: Any, _inputs: None, _name: str) -> Tensor:
    """Return the tokens among a layer's inputs."""
    return rows(given[0] if isinstance(given, tuple) else given)


def _no_inputs(_batch: Any, _config: LoraConfig) -> None:
    """Return nothing for PEFT to pass to ``_tokens``, which knows the tokens without it."""


def _require_inputs(sites: Sequence[Site], lora: LoraConfig, rho: float) -> None:
    for site in sites:
        r = rank_and_alpha(lora, site.name)[0]
        if round(r * rho) > site.in_features:
            raise OptionError(
                f"rho={rho} asks for {round(r * rho)} directions at {site.name}, whose inputs have {site.in_features}; "
                "lower rho or r"
            )
