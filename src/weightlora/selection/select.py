"""Selecting the adapters that matter: warm-up, scores, budget, plan. Read this file first.

plan = select(model, batches, lora=LoraConfig(r=8), keep=0.5)
model = plan.attach(model)                 # WeightLoRA: stock PEFT from here on
model = plan.expand().attach(model)        # WeightLoRA+: the same budget as plain LoRA

``select_trained`` also returns what the warm-up trained.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from numbers import Real
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from torch import Tensor, nn
from tqdm import tqdm

from weightlora.cost.knapsack import CostBudget
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.fast.dropout import Dropout
from weightlora.fast.enable import enable_fast_lora
from weightlora.model.distributed import is_first, require_agreement
from weightlora.model.gathering import why_not_attachable
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import find_sites
from weightlora.plan.budget import Keep, Limit
from weightlora.plan.card import base_model_name
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.ranking import Ranking
from weightlora.selection._budget import asked_budget, measured_budget, require_measurable
from weightlora.selection._kept import agreement_of, choices, kept_ranks, kept_sites, require_gradients
from weightlora.selection._trained import Trained, adapter_copies, head_copies, require_plain
from weightlora.selection.batches import Loss, cycled, in_parts, model_loss, peeked
from weightlora.selection.rules import settings_of
from weightlora.selection.rules.base import Rule
from weightlora.selection.stage import Stage, head_of, with_plain_lora
from weightlora.selection.steps import Steps, reading_times, scoring_cost, settled
from weightlora.selection.warmup import Warmup

#: Steps in which a new head is trained alone, unless the rule says otherwise.
HEAD_STEPS = 20
_LOG = logging.getLogger(__name__)


def select(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lora: LoraConfig | None = Warmup.lora,
    keep: Keep = Warmup.keep,
    rule: str | Rule = Warmup.rule,
    steps: Steps | None = Warmup.steps,
    total_steps: int | None = Warmup.total_steps,
    lr: float = Warmup.lr,
    head_lr: float | None = Warmup.head_lr,
    seed: int = Warmup.seed,
    ranking: Ranking | None = Warmup.ranking,
    loss_fn: Loss | None = Warmup.loss_fn,
    fast: Dropout | None = Warmup.fast,
    progress: bool = Warmup.progress,
) -> AdapterPlan:
    """Return a plan that keeps the adapters with the best scores; ``model`` stays bit for bit as it was.

    The warm-up puts plain LoRA on every candidate (see :func:`weightlora.find_sites`). The rule scores the sites over
    ``steps`` batches, and the best ones that fit the budget are kept. The paper's algorithm (section 2, phase 1) is
    ``rule="paper"``; docs/lab/selection.md has the measurements behind the defaults.

    Args:
        model: A transformers model, a PEFT model with a LoRA adapter, or any module with linear layers; whole, sharded
            by FSDP2's ``fully_shard`` or ZeRO-3, or offloaded to the CPU or disk by ``device_map``.
        batches: Dicts that the model is called with, such as a ``DataLoader`` yields; they are moved to the model's
            device. Fewer than needed are used again, with a warning. Several processes give each its own.
        lora: The adapters wanted. Every field but ``target_modules``, ``r``, ``lora_alpha`` and their patterns is
            passed unchanged into the final config. None takes the PEFT model's own config, else ``LoraConfig()``.
        keep: A fraction in (0, 1] of plain LoRA's parameters, a number of adapters K, or a budget:
            ``"300k parameters"``, ``"512MB"`` (trained parameters with gradients and AdamW's state, and what is saved
            for the backward pass of the first batch) or ``"0.8x"`` (step time on the first batch, relative to LoRA on
            all sites), or ``"auto"``: as many parameters as the smallest set that has three quarters of the sum of the
            scores, ``"60% gain"`` for another share. Memory and step time are those of plain LoRA with the step that
            ``fast`` names; see docs/guides/choose.md.
        rule: ``"first_order"`` (default) takes the size of the mean ∂L/∂B at B = 0 and trains nothing; ``"paper"`` is
            the paper's; or a rule with settings of its own, such as ``StoIHT(gate_lr=1.0)``, or one that you wrote.
        steps: T, warm-up steps in which sites are scored, at least 2; None stands for 0.5 % of ``total_steps``, at
            least the rule's ``least_steps``, 20 to 100. ``"auto"`` stops when the choice is stable, and after 30 or
            3 % of ``total_steps`` at the latest.
        total_steps: The steps of the training to come, where they are known.
        lr: AdamW's learning rate for what the warm-up trains, constant; best the one of the training. The rules
            ``integrated``, ``integrated_ranks`` and ``even_ranks`` take √(share of the sites that are kept) of it.
        head_lr: That of a new head; None stands for ``lr``.
        seed: Decides A's random start, dropout and a shuffling loader's order, whatever the global generators hold.
        ranking: How sites compete for the budget: ``"score"``, or ``"spread"`` (each part of the depth gets its share,
            for its best sites). None is ``"score"`` for a budget in memory or step time and for all rules but
            ``first_order``, and ``"spread"`` elsewhere.
        loss_fn: ``loss_fn(model, batch)`` → scalar tensor, or an iterator over the losses of micro-batches, whose
            gradients add up; the default is ``model(**batch).loss``.
        fast: The ``dropout`` of :func:`weightlora.enable_fast_lora`: the warm-up uses the fast step, and budgets in
            bytes or step time are measured with it. None is PEFT's step.
        progress: Show a bar where the output is a terminal.

    Raises:
        OptionError: An argument has a type or a value that it cannot have.
        SiteError: There is nothing to adapt; the model is inside ``DataParallel`` (give ``model.module``); or weights
            are on the meta device, have no shape yet, or let no gradient pass.
        SelectionError: The loss has no gradient or is not finite, no site had a gradient, or no site that the
            budget could take has a positive score.

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
    warmup = Warmup(
        lora=lora,
        keep=keep,
        rule=rule,
        steps=steps,
        total_steps=total_steps,
        lr=lr,
        head_lr=head_lr,
        seed=seed,
        ranking=ranking,
        loss_fn=loss_fn,
        fast=fast,
        progress=progress,
    )
    return selected(model, batches, warmup).plan


def select_trained(model: nn.Module, batches: Iterable[Any], *, rule: str | Rule, **options: Any) -> Trained:
    """Return what :func:`select` returns, and the kept adapters and the head as the warm-up left them.

    The paper initialises the kept adapters again. ``trained.attach(model)`` starts them from the warm-up's weights.

    Args:
        model: As in :func:`select`.
        batches: As in :func:`select`.
        rule: One that trains adapters: ``"integrated"``, ``"stoiht"`` or ``"paper"``.
        options: The other arguments of :func:`select`. ``lora`` is without DoRA and without an initialisation that
            changes the base weights. More ``steps`` train the adapters further, by the same batches that the training
            may see again.

    Raises:
        OptionError: The rule trains no adapters, or ``lora`` is not plain LoRA; see also :func:`select`.
        SiteError: See :func:`select`.
        SelectionError: See :func:`select`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> batches = [{"x": torch.randn(8, 8)} for _ in range(8)]
        >>> loss = lambda model, batch: (model(batch["x"]) - 1).pow(2).mean()
        >>> trained = select_trained(model, batches, rule="integrated", keep=1, steps=4, loss_fn=loss)
        >>> [(name, tuple(a.shape), bool(b.any())) for name, (a, b) in trained.adapters.items()]
        [('2', (8, 8), True)]
    """
    return selected(model, batches, Warmup(rule=rule, **options, warm_start=True))


def selected(model: nn.Module, batches: Iterable[Any], warmup: Warmup) -> Trained:
    """Return the plan, and with ``warm_start`` what the warm-up trained; without it no weights are copied.

    Args:
        model: As in :func:`select`.
        batches: As in :func:`select`.
        warmup: What is asked for.

    Raises:
        OptionError: See :func:`select`.
        SiteError: See :func:`select`.
        SelectionError: See :func:`select`.
    """
    _require_batches(batches)
    rule, keep, fast, steps = warmup.scored_by, warmup.keep, warmup.fast, warmup.t
    times = reading_times(steps, rule, warmup.total_steps)
    lora = deepcopy(_config_of(model) if warmup.lora is None else warmup.lora)
    found = find_sites(model, lora)
    if warmup.warm_start:
        require_plain(lora)
    sites = found.sites
    budget = asked_budget(
        keep, warmup.ranked_by, sites, lora, besides=sum(each.parameters for each in found.parameters)
    )
    if isinstance(budget, Limit):
        require_measurable(budget, model, lora)
    _warn_of_attach(model, lora)
    loss_fn = warmup.loss_fn or model_loss
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, Tensor] = {}

    start = time.perf_counter()
    with with_plain_lora(model, lora, sites, seed=warmup.seed) as attached:
        head = head_of(attached)
        head_steps = _head_steps(rule, bool(head))
        total = head_steps + rule.batches(times)
        level = _tell_cost(total, warmup.total_steps, most=steps == "auto")
        if fast is not None:
            enable_fast_lora(attached, fast)
        if isinstance(budget, Limit):
            first, batches = peeked(batches)
            with untouched(model, seed=warmup.seed):  # the scores are as if nothing had been measured
                budget = measured_budget(budget, attached, partial(in_parts, model, first, loss_fn), sites, lora)
        with tqdm(total=total, disable=None if warmup.progress else True, leave=False) as bar:
            rows = cycled(batches, total)
            stage = Stage(model, sites, lora_layers(attached), head, rows, loss_fn, bar, warmup.lr, warmup.head_lr)
            stage.train_head(head_steps)
            scored, scores = settled(rule.score(stage, times, budget), partial(choices, budget))
        require_gradients(list(stage.layers), scores)
        kept = kept_ranks(scores, budget) if scores.ranks else dict.fromkeys(kept_sites(scores, rule, budget))
        require_agreement(repr((kept, [site.name for site in sites])), "the choice")
        if warmup.warm_start:
            adapters, whole = adapter_copies(stage.layers, scores.gates, kept), head_copies(attached, head)

    if is_first():
        _LOG.log(level, "selection took %.1f s", time.perf_counter() - start)
    measured: dict[str, Any] = {"scored": scored} if steps == "auto" else {}
    measured |= {"cost": budget.price(kept)} if isinstance(budget, CostBudget) else {}
    measured |= {} if scores.halves is None else {"agreement": agreement_of(scores.halves)}
    plan = make_plan(
        sites,
        lora,
        kept=[sites[i].name for i in kept],
        scores=scores.final,
        errors=scores.errors,
        ranks={sites[i].name: len(own) for i, own in kept.items() if own is not None} or None,
        history=scores.history,
        rule=rule.name,
        options={**_options(warmup, head_steps), **measured},
        seed=warmup.seed,
        base_model=base_model_name(model),
        target_parameters=found.parameters,
    )
    return Trained(plan, adapters, whole)


def _tell_cost(scoring: int, training: int | None, *, most: bool) -> int:
    """Log what scoring will cost, where the training's steps are known; return the level."""
    if not (scoring and training):
        return logging.INFO
    level, line = scoring_cost(scoring, training, most=most)
    if is_first():
        _LOG.log(level, line)
    return level


def _options(warmup: Warmup, head_steps: int) -> dict[str, Any]:
    """The settings that a plan records; those that are off by default are left out."""
    return {
        "keep": warmup.keep,
        "steps": warmup.t,
        "lr": warmup.lr,
        **settings_of(warmup.scored_by),
        "head_steps": head_steps,
        **({} if warmup.head_lr is None else {"head_lr": warmup.head_lr}),
        **({} if warmup.ranked_by == "score" else {"ranking": warmup.ranked_by}),
        **({} if warmup.fast is None else {"fast": warmup.fast}),
        **({"warm_start": True} if warmup.warm_start else {}),
    }


def _require_batches(batches: object) -> None:
    if batches is None or isinstance(batches, str | Mapping | Real):
        kind = type(batches).__name__
        raise OptionError(f"batches is of type {kind}; give an iterable of batches, such as a DataLoader or [batch]")


def _warn_of_attach(model: nn.Module, lora: LoraConfig) -> None:
    reason = why_not_attachable(model, lora)
    if reason is not None:
        warnings.warn(f"plan.attach will refuse this model: {reason}", WeightLoraWarning, stacklevel=4)


def _head_steps(rule: Rule, has_head: bool) -> int:
    if rule.head_steps and not has_head:
        raise OptionError(f"head_steps={rule.head_steps}, but PEFT trains no module whole; name it in modules_to_save")
    return (HEAD_STEPS if has_head else 0) if rule.head_steps is None else rule.head_steps


def _config_of(model: nn.Module) -> LoraConfig:
    """The LoRA config that a PEFT model already has, else PEFT's defaults."""
    if not isinstance(model, PeftModel):
        return LoraConfig()
    config = model.peft_config[model.active_adapters[0]]
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise OptionError(f"the model carries {config.peft_type} adapters; give a LoRA model, or the base with lora=")
    return config
