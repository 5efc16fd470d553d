"""Selecting the adapters that matter: warm-up, scores, budget, plan. Read this file first.

plan = select(model, batches, lora=LoraConfig(r=8), keep=0.5)
model = plan.attach(model)                 # WeightLoRA: stock PEFT from here on
model = plan.expand().attach(model)        # WeightLoRA+: the same budget as plain LoRA
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from torch import nn
from tqdm import tqdm

from weightlora.cost.knapsack import CostBudget
from weightlora.cost.saved_bytes import Losses, parameter_cost, saved_cost
from weightlora.cost.step_time import time_cost
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.fast.dropout import Dropout
from weightlora.fast.enable import enable_fast_lora
from weightlora.model.distributed import from_first, require_agreement
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.plan.budget import (
    Chooser,
    GainShare,
    Keep,
    Limit,
    read_budget,
    read_limit,
    read_share,
    warmup_steps,
)
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name
from weightlora.plan.ranking import Ranking, ranked
from weightlora.plan.ranks import chosen_ranks
from weightlora.selection._jackknife import rank_correlation
from weightlora.selection.batches import Loss, cycled, in_parts, model_loss, peeked
from weightlora.selection.rules import rule_of, settings_of
from weightlora.selection.rules.base import Rule, Scores, require
from weightlora.selection.stage import Stage, head_of, with_plain_lora

#: Steps in which a new head is trained alone, unless the rule says otherwise.
HEAD_STEPS = 20
#: With fewer sites the agreement of two halves says nothing.
_FEW = 10


def select(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lora: LoraConfig | None = None,
    keep: Keep = 0.5,
    rule: str | Rule = "first_order",
    steps: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    ranking: Ranking = "score",
    loss_fn: Loss | None = None,
    fast: Dropout | None = None,
    progress: bool = True,
) -> AdapterPlan:
    """Return a plan that keeps the adapters with the best scores; ``model`` stays bit for bit as it was.

    The warm-up puts plain LoRA on every candidate (see :func:`weightlora.find_sites`). The rule scores the sites over
    ``steps`` batches, and the best ones that fit the budget are kept. The paper's algorithm (section 2, phase 1) is
    ``rule="paper"``; docs/lab/selection.md has the measurements behind the defaults.

    Args:
        model: A transformers model, a PEFT model with a LoRA adapter, or any module with linear layers; whole, or
            sharded by FSDP2's ``fully_shard``.
        batches: Dicts that the model is called with, such as a ``DataLoader`` yields; they are moved to the model's
            device. Fewer than needed are used again, with a warning. Several processes give each its own.
        lora: The adapters wanted. Every field but ``target_modules``, ``r``, ``lora_alpha`` and their patterns is
            passed unchanged into the final config. None takes the PEFT model's own config, else ``LoraConfig()``.
        keep: A fraction in (0, 1] of plain LoRA's parameters, a number of adapters K, or a budget:
            ``"300k parameters"``, ``"512MB"`` (trained parameters with gradients and AdamW's state, and what is saved
            for the backward pass of the first batch) or ``"0.8x"`` (step time on the first batch, relative to LoRA on
            all sites), or ``"auto"``: the smallest set that has half of the sum of the scores, ``"60% gain"`` for
            another share. Memory and step time are those of plain LoRA with the step that ``fast`` names; see
            docs/guides/budgets.md.
        rule: ``"first_order"`` (default) takes the size of the mean ∂L/∂B at B = 0 and trains nothing; ``"paper"`` is
            the paper's; or a rule with settings of its own, such as ``StoIHT(gate_lr=1.0)``.
        steps: T, warm-up steps in which sites are scored, at least 2; None stands for 20.
        lr: AdamW's learning rate for what the warm-up trains, constant; best the one of the training.
        seed: Decides A's random start, dropout and a shuffling loader's order, whatever the global generators hold.
        ranking: How sites compete for the budget: ``"score"``, ``"per_parameter"`` (score ÷ parameters) or ``"quota"``
            (each projection type gets at most its share).
        loss_fn: ``loss_fn(model, batch)`` → scalar tensor, or an iterator over the losses of micro-batches, whose
            gradients add up; the default is ``model(**batch).loss``.
        fast: The ``dropout`` of :func:`weightlora.enable_fast_lora`: the warm-up uses the fast step, and budgets in
            bytes or step time are measured with it. None is PEFT's step.
        progress: Show a bar where the output is a terminal.

    Raises:
        OptionError: An argument is out of its range.
        SiteError: There is nothing to adapt.
        SelectionError: The loss has no gradient or is not finite, no site had a gradient, or too few sites have a
            positive score.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> x = torch.linspace(-1, 1, 64).reshape(8, 8)
        >>> loss = lambda model, batch: (model(batch["x"]) - 1).pow(2).mean()
        >>> plan = select(model, [{"x": x}] * 4, lora=LoraConfig(r=2), keep=1, steps=4, loss_fn=loss)
        >>> plan.names
        ('2',)
    """
    rule = rule_of(rule)
    steps = warmup_steps(None) if steps is None else steps
    require_warmup(steps=steps, lr=lr)
    lora = deepcopy(_config_of(model) if lora is None else lora)
    sites = find_sites(model, lora).sites
    budget = _read(keep, ranking, sites, adapter_parameters(sites, lora))
    loss_fn = loss_fn or model_loss

    with with_plain_lora(model, lora, sites, seed=seed) as attached:
        head = head_of(attached)
        head_steps = _head_steps(rule, bool(head))
        if fast is not None:
            enable_fast_lora(attached, fast)
        if isinstance(budget, Limit):
            first, batches = peeked(batches)
            with untouched(model, seed=seed):  # the scores are as if nothing had been measured
                budget = _measured(budget, attached, partial(in_parts, model, first, loss_fn), sites)
        total = head_steps + rule.batches(steps)
        with tqdm(total=total, disable=None if progress else True, leave=False) as bar:
            stage = Stage(model, lora_layers(attached), head, cycled(batches, total), loss_fn, bar, lr)
            stage.train_head(head_steps)
            scores = rule.score(stage, steps, budget)
        _require_gradients(list(stage.layers), scores)
        ranks = chosen_ranks(budget, scores.ranks) if scores.ranks else None
        kept = _kept(scores, rule, budget) if ranks is None else tuple(i for i, r in enumerate(ranks) if r)
        if not kept:
            raise SelectionError("no rank has a positive score; raise steps, or give more batches")
        require_agreement(repr((kept, [site.name for site in sites])), "the choice")

    settings = {**settings_of(rule), "head_steps": head_steps}
    cost = {"cost": budget.price(kept)} if isinstance(budget, CostBudget) else {}
    agreement = {} if scores.halves is None else {"agreement": _agreement(scores.halves)}
    return make_plan(
        sites,
        lora,
        kept=[sites[i].name for i in kept],
        scores=scores.final,
        errors=scores.errors,
        ranks=None if ranks is None else {sites[i].name: ranks[i] for i in kept},
        history=scores.history,
        rule=rule.name,
        options={
            "keep": keep,
            "steps": steps,
            "lr": lr,
            **settings,
            **({} if ranking == "score" else {"ranking": ranking}),
            **({} if fast is None else {"fast": fast}),
            **cost,
            **agreement,
        },
        seed=seed,
        base_model=base_model_name(model),
    )


def require_warmup(*, steps: int | None, lr: float) -> None:
    """Raise unless ``steps`` and ``lr`` can be those of a warm-up.

    Raises:
        OptionError: One of them is out of its range.
    """
    if steps is not None:
        require(isinstance(steps, int), f"steps={steps!r}", "a whole number")  # pyright: ignore[reportUnnecessaryIsInstance]
        require(steps >= 2, f"steps={steps}", "at least 2: with B = 0 the first gradient of ω is zero")
    require(0 < lr < float("inf"), f"lr={lr}", "a positive number")


def _read(keep: Keep, ranking: Ranking, sites: Sequence[Site], parameters: Mapping[str, int]) -> Chooser | Limit:
    share = read_share(keep)
    if share is not None:
        budget = GainShare(tuple(parameters.values()), share)
    else:
        budget = read_limit(keep) or read_budget(keep, parameters)
    return ranked(budget, ranking, sites, parameters)


def _head_steps(rule: Rule, has_head: bool) -> int:
    if rule.head_steps and not has_head:
        raise OptionError(f"head_steps={rule.head_steps}, but PEFT trains no module whole; name it in modules_to_save")
    return (HEAD_STEPS if has_head else 0) if rule.head_steps is None else rule.head_steps


def _require_gradients(names: Sequence[str], scores: Scores) -> None:
    """Raise where no site had a gradient in the whole warm-up; warn where some had none."""
    without = [name for name, found in zip(names, scores.has_gradient, strict=True) if not found]
    if len(without) == len(names):
        raise SelectionError(
            f"no site had a gradient in {len(scores.history)} warm-up steps, so their scores say nothing; does the "
            "loss depend on the adapted layers?"
        )
    if without:
        warnings.warn(
            f"{len(without)} of {len(names)} sites had no gradient in the warm-up, {without[0]} among them: the loss "
            "does not depend on them; leave them out of target_modules",
            WeightLoraWarning,
            stacklevel=3,
        )


def _agreement(halves: tuple[Sequence[float], Sequence[float]]) -> float:
    """Return the rank correlation of the scores of the two halves of the batches; warn where it may be chance."""
    found = rank_correlation(*halves)
    # Of two rankings of n sites at random it has the mean 0 and the standard deviation 1/√(n−1).
    if len(halves[0]) >= _FEW and found < 2 / (len(halves[0]) - 1) ** 0.5:
        warnings.warn(
            f"these scores cannot tell the sites apart: two halves of the batches rank them with a correlation of "
            f"{found:.2f}; more steps, or a random choice, would serve as well",
            WeightLoraWarning,
            stacklevel=3,
        )
    return found


def _kept(scores: Scores, rule: Rule, budget: Chooser) -> tuple[int, ...]:
    """Positions of the sites with the best scores: within the budget, and positive."""
    wanted = budget.choose(scores.sizes)
    positive = {i for i, score in enumerate(scores.final) if score > 0}
    kept = tuple(i for i in wanted if i in positive)
    # A small site without a positive score may fill what a larger one left of the budget: it is left out.
    if not kept or (len(kept) < len(wanted) and positive <= set(kept)):
        knobs = [*([f"keep to {len(kept)}"] if kept else []), *rule.knobs]
        advice = f"; lower {' or '.join(knobs)}" if knobs else ""
        raise SelectionError(f"only {len(kept)} of the {len(wanted)} wanted sites have a positive score{advice}")
    return kept


def _measured(limit: Limit, attached: nn.Module, losses: Losses, sites: Sequence[Site]) -> CostBudget:
    """The budget of ``limit``, measured on a step of plain LoRA; all processes use the first one's numbers."""
    in_bytes = limit.unit == "bytes"
    own = saved_cost(attached, losses) + parameter_cost(attached) if in_bytes else time_cost(attached, losses)
    cost = from_first(lambda: own)
    if in_bytes:
        budget = CostBudget(cost, int(limit.amount))
    else:
        budget = CostBudget(cost, int(limit.amount * cost.of_all), unit=cost.of_all)
    least = budget.price([cost.cheapest])
    if cost.of([cost.cheapest]) > budget.limit:
        needed = f"{least / 1e6:.3f} MB" if in_bytes else f"{least:.3f}x"
        knobs = ", or lower r or the size of the batch" if in_bytes else ""
        raise OptionError(
            f"keep={limit.text!r} fits no site: the cheapest, {sites[cost.cheapest].name}, takes {needed}; raise "
            f"keep{knobs}"
        )
    return budget


def _config_of(model: nn.Module) -> LoraConfig:
    """The LoRA config that a PEFT model already has, else PEFT's defaults."""
    if not isinstance(model, PeftModel):
        return LoraConfig()
    config = model.peft_config[model.active_adapters[0]]
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise OptionError(f"the model carries {config.peft_type} adapters; give a LoRA model, or the base with lora=")
    return config
