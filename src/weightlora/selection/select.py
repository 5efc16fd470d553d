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
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, get_args

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
from weightlora.options import check_types
from weightlora.plan.budget import Keep, Limit
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name
from weightlora.plan.ranking import Ranking, ranking_of
from weightlora.selection._budget import asked_budget, measured_budget, require_measurable
from weightlora.selection._kept import agreement_of, choices, kept_ranks, kept_sites, require_gradients
from weightlora.selection._trained import Trained, adapter_copies, head_copies, require_plain
from weightlora.selection.batches import Loss, cycled, in_parts, model_loss, peeked
from weightlora.selection.rules import require_training_rule, rule_of, settings_of
from weightlora.selection.rules.base import Rule, require
from weightlora.selection.stage import Stage, head_of, with_plain_lora
from weightlora.selection.steps import Steps, check_steps, reading_times, scoring_cost, settled, warmup_steps

#: Steps in which a new head is trained alone, unless the rule says otherwise.
HEAD_STEPS = 20
_LOG = logging.getLogger(__name__)


def select(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lora: LoraConfig | None = None,
    keep: Keep = 0.5,
    rule: str | Rule = "first_order",
    steps: Steps | None = None,
    total_steps: int | None = None,
    lr: float = 1e-3,
    head_lr: float | None = None,
    seed: int = 0,
    ranking: Ranking | None = None,
    loss_fn: Loss | None = None,
    fast: Dropout | None = None,
    progress: bool = True,
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
            the paper's; or a rule with settings of its own, such as ``StoIHT(gate_lr=1.0)``.
        steps: T, warm-up steps in which sites are scored, at least 2; None stands for 0.5 % of ``total_steps``, at
            least the rule's ``least_steps``, 20 to 100. ``"auto"`` stops when the choice is stable, and after 30 or
            3 % of ``total_steps`` at the latest.
        total_steps: The steps of the training to come, where they are known.
        lr: AdamW's learning rate for what the warm-up trains, constant; best the one of the training. The rules
            ``integrated``, ``integrated_ranks`` and ``even_ranks`` take a part of it, their ``lr_scale``.
        head_lr: That of a new head; None stands for ``lr``.
        seed: Decides A's random start, dropout and a shuffling loader's order, whatever the global generators hold.
        ranking: How sites compete for the budget: ``"score"``, ``"per_parameter"`` (score ÷ parameters), ``"quota"``
            (each projection type gets its share, rounded) or ``"spread"`` (each part of the depth gets its share, for
            its best sites). None is ``"score"`` for a budget in memory or step time and for all rules but
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
    asked = _Asked(lora, keep, rule_of(rule), steps, total_steps, lr, head_lr, seed, ranking, loss_fn, fast, progress)
    return _select(model, batches, asked).plan


def select_trained(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rule: str | Rule,
    lora: LoraConfig | None = None,
    keep: Keep = 0.5,
    steps: Steps | None = None,
    total_steps: int | None = None,
    lr: float = 1e-3,
    head_lr: float | None = None,
    seed: int = 0,
    ranking: Ranking | None = None,
    loss_fn: Loss | None = None,
    fast: Dropout | None = None,
    progress: bool = True,
) -> Trained:
    """Return what :func:`select` returns, and the kept adapters and the head as the warm-up left them.

    The paper initialises the kept adapters again. ``trained.attach(model)`` starts them from the warm-up's weights.

    Args:
        model: As in :func:`select`.
        batches: As in :func:`select`.
        rule: One that trains adapters: ``"integrated"``, ``"stoiht"`` or ``"paper"``.
        lora: As in :func:`select`, without DoRA and without an initialisation that changes the base weights.
        keep: As in :func:`select`.
        steps: As in :func:`select`; more steps train the adapters further, by the same batches that the training may
            see again.
        total_steps: As in :func:`select`.
        lr: AdamW's constant learning rate, with which the adapters are trained.
        head_lr: As in :func:`select`.
        seed: As in :func:`select`.
        ranking: As in :func:`select`.
        loss_fn: As in :func:`select`.
        fast: As in :func:`select`.
        progress: As in :func:`select`.

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
    asked = _Asked(lora, keep, rule_of(rule), steps, total_steps, lr, head_lr, seed, ranking, loss_fn, fast, progress)
    return _select(model, batches, replace(asked, warm_start=True))


@dataclass(frozen=True)
class _Asked:
    """The arguments of a selection; see :func:`select`."""

    lora: LoraConfig | None
    keep: Keep
    rule: Rule
    steps: Steps | None
    total_steps: int | None
    lr: float
    head_lr: float | None
    seed: int
    ranking: Ranking | None
    loss_fn: Loss | None
    fast: Dropout | None
    progress: bool
    warm_start: bool = False


def _select(model: nn.Module, batches: Iterable[Any], asked: _Asked) -> Trained:
    """Return the plan; without ``warm_start`` no weights are copied."""
    rule, keep, lr, seed, fast = asked.rule, asked.keep, asked.lr, asked.seed, asked.fast
    ranking = ranking_of(asked.ranking, keep, rule.ranking)
    _require_asked(asked, batches)
    steps = warmup_steps(asked.total_steps, rule.least_steps) if asked.steps is None else asked.steps
    times = reading_times(steps, rule, asked.total_steps)
    lora = deepcopy(_config_of(model) if asked.lora is None else asked.lora)
    found = find_sites(model, lora)
    if asked.warm_start:
        require_training_rule(rule)
        require_plain(lora)
    sites = found.sites
    budget = asked_budget(keep, ranking, sites, lora, besides=sum(each.parameters for each in found.parameters))
    if isinstance(budget, Limit):
        require_measurable(budget, model, lora)
    _warn_of_attach(model, lora)
    loss_fn = asked.loss_fn or model_loss
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, Tensor] = {}

    start = time.perf_counter()
    with with_plain_lora(model, lora, sites, seed=seed) as attached:
        head = head_of(attached)
        head_steps = _head_steps(rule, bool(head))
        total = head_steps + rule.batches(times)
        level = _tell_cost(total, asked.total_steps, most=steps == "auto")
        if fast is not None:
            enable_fast_lora(attached, fast)
        if isinstance(budget, Limit):
            first, batches = peeked(batches)
            with untouched(model, seed=seed):  # the scores are as if nothing had been measured
                budget = measured_budget(budget, attached, partial(in_parts, model, first, loss_fn), sites, lora)
        with tqdm(total=total, disable=None if asked.progress else True, leave=False) as bar:
            stage = Stage(model, lora_layers(attached), head, cycled(batches, total), loss_fn, bar, lr, asked.head_lr)
            stage.train_head(head_steps)
            scored, scores = settled(rule.score(stage, times, budget), partial(choices, budget))
        require_gradients(list(stage.layers), scores)
        kept = kept_ranks(scores, budget) if scores.ranks else dict.fromkeys(kept_sites(scores, rule, budget))
        require_agreement(repr((kept, [site.name for site in sites])), "the choice")
        if asked.warm_start:
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
        options={**_options(asked, ranking, steps, head_steps), **measured},
        seed=seed,
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


def _options(asked: _Asked, ranking: Ranking, steps: Steps, head_steps: int) -> dict[str, Any]:
    """The settings that a plan records; those that are off by default are left out."""
    return {
        "keep": asked.keep,
        "steps": steps,
        "lr": asked.lr,
        **settings_of(asked.rule),
        "head_steps": head_steps,
        **({} if asked.head_lr is None else {"head_lr": asked.head_lr}),
        **({} if ranking == "score" else {"ranking": ranking}),
        **({} if asked.fast is None else {"fast": asked.fast}),
        **({"warm_start": True} if asked.warm_start else {}),
    }


def _require_asked(asked: _Asked, batches: object) -> None:
    """Raise where an argument has a type or a value that it cannot have; model and LoRA config are checked later."""
    check_types(_Asked.__annotations__, vars(asked))
    steps, total_steps, fast, loss_fn = asked.steps, asked.total_steps, asked.fast, asked.loss_fn
    require(not isinstance(steps, str) or steps == "auto", f"steps={steps!r}", "a whole number or 'auto'")
    require_warmup(steps=steps, lr=asked.lr, head_lr=asked.head_lr)
    require(total_steps is None or total_steps >= 0, f"total_steps={total_steps}", "a whole number from 0, or None")
    require(fast is None or fast in get_args(Dropout), f"fast={fast!r}", "'input', 'rank' or None")
    require(loss_fn is None or callable(loss_fn), f"loss_fn={loss_fn!r:.80}", "a function, or None")
    if batches is None or isinstance(batches, str | Mapping | Real):
        kind = type(batches).__name__
        raise OptionError(f"batches is of type {kind}; give an iterable of batches, such as a DataLoader or [batch]")


def require_warmup(*, steps: Steps | None, lr: float, head_lr: float | None = None) -> None:
    """Raise unless steps and learning rates can be those of a warm-up.

    Raises:
        OptionError: One of them is out of its range.
    """
    if steps is not None:
        check_steps(steps)
    require(0 < lr < float("inf"), f"lr={lr}", "a positive number")
    require(head_lr is None or 0 < head_lr < float("inf"), f"head_lr={head_lr}", "a positive number")


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
