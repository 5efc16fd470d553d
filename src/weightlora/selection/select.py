"""Selecting the adapters that matter: limits, scores, ranks, plan. Read this file first.

plan = select(model, batches, lora=LoraConfig(r=8), adapters=0.5)
model = plan.attach(model)                 # stock PEFT from here on

``select_trained`` also returns what the scoring trained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from numbers import Real
from time import perf_counter
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from torch import nn
from tqdm import tqdm

from weightlora.cost.knapsack import CostBudget
from weightlora.cost.peak import Peaks
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.fast.enable import enable_fast_lora
from weightlora.fast.step import Dropout
from weightlora.model.distributed import is_first, require_agreement
from weightlora.model.gathering import why_not_attachable
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import Site, find_sites, output_vectors
from weightlora.plan.budget import Chooser, Ranking, ranked, whole_budget
from weightlora.plan.card import base_model_name
from weightlora.plan.limits import UNIFORM, Limits
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.selection._course import (
    choices,
    course_of,
    found_by,
    kept_numbers,
    measured_by,
    options_of,
    require_gradients,
    require_positive,
    spent_on,
    steps_by,
    stored_by,
    tell_cost,
    warn_of_chance,
)
from weightlora.selection._measured import measured, require_measurable, within_memory
from weightlora.selection.allocate import Costs, allocate, chooser_of, rank_budget
from weightlora.selection.batches import FirstBatch, Loss, cycled, model_loss, peeked
from weightlora.selection.progress import Progress
from weightlora.selection.rules.base import Rule, Scores
from weightlora.selection.scoring import Scoring
from weightlora.selection.stage import Stage, head_of, with_plain_lora
from weightlora.selection.steps import Steps, settled
from weightlora.selection.trained import Trained, adapter_copies, begun_by, head_copies, require_plain

_LOG = logging.getLogger(__name__)
#: From a function that ``selected`` calls, warnings name the line that called ``select()``: so many frames above.
_CALLER = 4


def select(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lora: LoraConfig | None = Scoring.lora,
    adapters: float | None = None,
    parameters: float | None = None,
    time: float | None = None,
    memory: str | None = None,
    rule: str | Rule | None = None,
    steps: Steps | None = Scoring.steps,
    total_steps: int | None = Scoring.total_steps,
    learning_rate: float = Scoring.learning_rate,
    head_learning_rate: float | None = Scoring.head_learning_rate,
    seed: int = Scoring.seed,
    ranking: Ranking | None = Scoring.ranking,
    loss_fn: Loss | None = Scoring.loss_fn,
    fast: Dropout | None = Scoring.fast,
    progress: bool = Scoring.progress,
) -> AdapterPlan:
    """Return a plan within the limits; ``model`` stays bit for bit as it was.

    Four limits can be combined, and all of them hold: see :func:`weightlora.selection.allocate.allocate`. Without any,
    half of the adapters are kept, as in the paper. With ``parameters`` ranks are free: a lower rank on all sites. With
    ``time`` steps are: fewer of them. For these two nothing is scored and no batch is read.

    Otherwise plain LoRA is put on every candidate (see :func:`weightlora.find_sites`), and the rule scores the sites on
    the first batches. The paper's algorithm (section 2, phase 1) is ``rule="paper"``; docs/lab/choice.md has the
    measurements behind the defaults.

    Args:
        model: A transformers model, a PEFT model with a LoRA adapter, or any module with linear layers; whole, sharded
            by FSDP2's ``fully_shard`` or ZeRO-3, or offloaded to the CPU or disk by ``device_map``.
        batches: Dicts that the model is called with, such as a ``DataLoader`` yields; they are moved to the model's
            device. Fewer than needed are used again, with a warning. Several processes give each its own.
        lora: The adapters wanted. Every field but ``target_modules``, ``r``, ``lora_alpha`` and their patterns is
            passed unchanged into the final config. None takes the PEFT model's own config, else ``LoraConfig()``.
        adapters: At most so many whole adapters at the user's rank, the paper's K: ``18``, or a share such as ``0.5``.
        parameters: At most so many adapter parameters: ``300_000``, or a share of LoRA's such as ``0.1``. Ranks are
            free; on sites within ``adapters``, ``time`` or ``memory`` they may rise above the user's. A rule of sites
            that is named keeps whole adapters instead, if there is no other limit.
        time: At most this share of LoRA's time, such as ``0.6``. Alone or with ``parameters``: all sites, for this
            share of the steps (``plan.step_share``); nothing is scored. With a rule that is named, ``adapters`` or
            ``memory``: the sites whose step takes this share of LoRA's, measured on the first batch. For
            ``select_for(..., store=True)`` see there.
        memory: The most at the peak of the device, such as ``"8GB"``, with frozen weights, activations, gradients and
            AdamW's state, counted on the first batch. Alone or with ``parameters``: all sites, with so many parts of a
            batch one after the other (``plan.batch_parts``); nothing is scored. With a rule that is named, ``adapters``
            or ``time``, or where a single row does not fit: the sites whose peak fits.
        rule: How sites are scored: None takes ``"first_order"``, the size of the mean ∂L/∂B at B = 0, which trains
            nothing; ``"paper"`` is the paper's; or a rule with settings of its own, such as ``StoIHT(gate_lr=1.0)``,
            or one that you wrote.
        steps: T, steps in which sites are scored. None: with a rule that is not named, at most 3 % of ``total_steps``
            together with a new head's, or 20; with one that is, 0.5 % of ``total_steps``, at least the rule's
            ``least_steps``. ``"auto"`` stops when the choice is stable, and after 30 or 3 % of ``total_steps`` at the
            latest.
        total_steps: The steps of the training to come, where they are known.
        learning_rate: AdamW's learning rate for what the scoring trains, constant; best the one of the training. The
            rules ``integrated``, ``integrated_ranks`` and ``even_ranks`` take √(share of the kept sites) of it.
        head_learning_rate: That of a new head; None stands for ``learning_rate``.
        seed: Decides A's random start, dropout and a shuffling loader's order, whatever the global generators hold.
        ranking: How sites compete: ``"score"``, or ``"spread"`` (each part of the depth gets its share, for its best
            sites). None is ``"spread"`` for ``first_order`` within a number of adapters or parameters, and ``"score"``
            elsewhere.
        loss_fn: ``loss_fn(model, batch)`` → scalar tensor, or an iterator over the losses of micro-batches, whose
            gradients add up; the default is ``model(**batch).loss``.
        fast: The ``dropout`` of :func:`weightlora.enable_fast_lora`: the scoring uses the fast step, and time and
            memory are measured with it. None is PEFT's step.
        progress: Show a bar where the output is a terminal.

    Raises:
        OptionError: An argument has a type or a value that it cannot have.
        SiteError: There is nothing to adapt; the model is inside ``DataParallel`` (give ``model.module``); or weights
            are on the meta device, have no shape yet, or let no gradient pass.
        SelectionError: The loss has no gradient or is not finite, no site had a gradient, or no site that fits has a
            positive score.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> x = torch.linspace(-1, 1, 64).reshape(8, 8)
        >>> loss = lambda model, batch: (model(batch["x"]) - 1).pow(2).mean()
        >>> plan = select(model, [{"x": x}] * 4, lora=LoraConfig(r=2), adapters=1, steps=4, loss_fn=loss)
        >>> plan.names
        ('2',)
    """
    scoring = Scoring(
        lora=lora,
        adapters=adapters,
        parameters=parameters,
        time=time,
        memory=memory,
        rule=rule,
        steps=steps,
        total_steps=total_steps,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        seed=seed,
        ranking=ranking,
        loss_fn=loss_fn,
        fast=fast,
        progress=progress,
    )
    return selected(model, batches, scoring).plan


def select_trained(model: nn.Module, batches: Iterable[Any], *, rule: str | Rule, **options: Any) -> Trained:
    """Return what :func:`select` returns, and the kept adapters and the head as the scoring left them.

    The paper initialises the kept adapters again. ``trained.attach(model)`` starts them from these weights.

    Args:
        model: As in :func:`select`.
        batches: As in :func:`select`.
        rule: One that trains adapters: ``"integrated"`` or ``"paper"``, for instance.
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
        >>> trained = select_trained(model, batches, rule="integrated", adapters=1, steps=4, loss_fn=loss)
        >>> [(name, tuple(a.shape), bool(b.any())) for name, (a, b) in trained.adapters.items()]
        [('2', (8, 8), True)]
    """
    return selected(model, batches, Scoring(rule=rule, **options, warm_start=True))


def selected(model: nn.Module, batches: Iterable[Any], scoring: Scoring) -> Trained:
    """Return the plan, and with ``warm_start`` what the scoring trained; without it no weights are copied.

    Args:
        model: As in :func:`select`.
        batches: As in :func:`select`.
        scoring: What is asked for.

    Raises:
        OptionError: See :func:`select`.
        SiteError: See :func:`select`.
        SelectionError: See :func:`select`.
    """
    _require_batches(batches)
    lora = deepcopy(_config_of(model) if scoring.lora is None else scoring.lora)
    found = find_sites(model, lora)
    if scoring.warm_start:
        require_plain(lora)
    _warn_of_attach(model, lora)
    scoring.warn_of_all(stacklevel=_CALLER)
    costs = Costs.of(found.sites, lora, besides=sum(each.parameters for each in found.parameters))
    record: dict[str, Any] = {
        "seed": scoring.seed,
        "base_model": base_model_name(model),
        "target_parameters": found.parameters,
    }
    if scoring.scored_by is None:
        return Trained(_unscored(found.sites, lora, costs, scoring, **record), {}, {})
    if scoring.are_measured:
        require_measurable(scoring, model, lora, costs)
    if not scoring.are_measured or scoring.scored_by.scores_ranks:  # a mistake is found before anything is run
        _chooser(scoring.scored_by, found.sites, costs, scoring)

    start = perf_counter()
    with with_plain_lora(model, lora, found.sites, seed=scoring.seed) as attached:
        head, loss_fn = head_of(attached), scoring.loss_fn or model_loss
        course = course_of(scoring, bool(head))
        rule, total = course.rule, course.steps - course.measuring
        if scoring.fast is not None:
            enable_fast_lora(attached, scoring.fast)
        peaks = None
        if scoring.are_measured:
            first, batches = peeked(batches)
            with untouched(model, seed=scoring.seed):  # the scores are as if nothing had been measured
                measured_on = FirstBatch(model, first, loss_fn)
                peaks = Peaks.of_model(attached, measured_on, vectors=output_vectors(lora))
                costs = measured(costs, scoring, course, peaks, measured_on)
        if scoring.are_measured and _scores_decide_nothing(rule, found.sites, costs, scoring):
            spent = spent_on(scoring, course, 0)
            return Trained(_unscored(found.sites, lora, costs, scoring, **record, spent=spent), {}, {})
        chooser = _chooser(rule, found.sites, costs, scoring)
        warn_of_chance(scoring, course)
        level = tell_cost(scoring, course.steps, most=len(course.times) > 1)
        with tqdm(total=total, disable=None if scoring.progress else True, leave=False) as bar:
            rows = cycled(batches, total)
            rates = (scoring.learning_rate, scoring.head_learning_rate)
            run = None if scoring.run is None else scoring.run(attached)
            shown = Progress(bar, "scoring")
            stage = Stage(model, found.sites, lora_layers(attached), head, rows, loss_fn, shown, *rates, run)
            stage.train_head(course.head_steps)
            scored, scores = settled(rule.score(stage, course.times, chooser), partial(choices, chooser))
        require_gradients(list(stage.layers), scores)
        ranks, peak = _scored_ranks(found.sites, scores, chooser, costs, peaks, rule, scoring)
        share, steps = steps_by(chooser, scores, ranks)
        require_agreement(repr((ranks, [site.name for site in found.sites])), "the choice")
        warm = scoring.warm_start
        adapters = adapter_copies(stage.layers, scores.gates, kept_numbers(scores, ranks)) if warm else {}
        whole = head_copies(attached, head) if warm or run is not None else {}
        begun = None if run is None else begun_by(run, attached, head, scored)

    if is_first():
        _LOG.log(level, "selection took %.1f s", perf_counter() - start)
    plan = _planned(
        found.sites,
        lora,
        ranks,
        alpha_by="ratio" if scores.ranks else "least",
        scores=scores.final,
        errors=scores.errors,
        history=scores.history,
        rule=rule.name,
        options=options_of(scoring, course)
        | found_by(scored, scores, course)
        | measured_by(costs, ranks, peak, share)
        | steps,
        spent=spent_on(scoring, course, scored),
        **record,
    )
    return Trained(plan, adapters, whole, begun)


def _chooser(rule: Rule, sites: Sequence[Site], costs: Costs, scoring: Scoring) -> Chooser:
    """What chooses sites or ranks by the rule's scores.

    Raises:
        OptionError: The rule or its ranking does not go with the limits, or nothing fits.
    """
    if rule.scores_ranks:
        return whole_budget(ranked(rank_budget(costs, scoring), scoring.ranked_by, sites))
    return chooser_of(sites, costs, scoring, scoring.ranked_by)


def _scored_ranks(
    sites: Sequence[Site],
    scores: Scores,
    chooser: Chooser,
    costs: Costs,
    peaks: Peaks | None,
    rule: Rule,
    scoring: Scoring,
) -> tuple[list[int], int]:
    """The rank of each site by its scores, and the counted peak in bytes; 0 where memory is not limited.

    Raises:
        SelectionError: No score is positive, or no site with a positive score fits.
    """
    if scores.ranks:
        ranks = allocate(sites, scores.ranks, costs, scoring)
        if not any(ranks):
            raise SelectionError("no rank has a positive score; raise steps, or give more batches")
        return ranks, 0
    positive = [size if final > 0 else 0.0 for size, final in zip(scores.sizes, scores.final, strict=True)]
    require_positive(scores, rule, chooser)
    choose = partial(allocate, sites, positive, limits=scoring, ranking=scoring.ranked_by)
    return (choose(costs), 0) if peaks is None or costs.memory is None else within_memory(choose, costs, peaks)


def _scores_decide_nothing(rule: Rule, sites: Sequence[Site], costs: Costs, scoring: Scoring) -> bool:
    """Whether all sites are within the measured limits, or are with fewer rows at once."""
    if scoring.frees_rows and costs.micro_batch is not None:
        return True
    chooser = _chooser(rule, sites, costs, scoring)
    return scoring.rule is None and isinstance(chooser, CostBudget) and chooser.holds(range(len(sites)))


def _unscored(sites: Sequence[Site], lora: LoraConfig, costs: Costs, scoring: Scoring, **record: Any) -> AdapterPlan:
    """The plan where scores decide nothing: ranks, steps or rows are free, or all sites are within the limits."""
    by_steps = scoring.scored_by is None and scoring.time is not None
    part = costs.micro_batch if scoring.frees_rows else None
    limits = Limits(parameters=scoring.parameters or 1.0) if by_steps or part else scoring
    ranks = allocate(sites, None, costs, limits)
    peak = 0 if costs.memory is None else costs.memory.of_all + costs.growth(costs.memory, ranks)
    options = {**scoring.limits.asked, **stored_by(scoring), **measured_by(costs, ranks, part.peak if part else peak)}
    options |= {"step_share": scoring.time} if by_steps else {}
    options |= {} if part is None else {"batch_parts": part.parts}
    return _planned(sites, lora, ranks, alpha_by="least", rule=UNIFORM, options=options, **record)


def _planned(sites: Sequence[Site], lora: LoraConfig, ranks: Sequence[int], **record: Any) -> AdapterPlan:
    kept = {site.name: r for site, r in zip(sites, ranks, strict=True) if r}
    return make_plan(sites, lora, kept=[*kept], ranks=kept, **record)


def _require_batches(batches: object) -> None:
    if batches is None or isinstance(batches, str | Mapping | Real):
        kind = type(batches).__name__
        raise OptionError(f"batches is of type {kind}; give an iterable of batches, such as a DataLoader or [batch]")


def _warn_of_attach(model: nn.Module, lora: LoraConfig) -> None:
    reason = why_not_attachable(model, lora)
    if reason is not None:
        warnings.warn(f"plan.attach will refuse this model: {reason}", WeightLoraWarning, stacklevel=_CALLER)


def _config_of(model: nn.Module) -> LoraConfig:
    """The LoRA config that a PEFT model already has, else PEFT's defaults."""
    if not isinstance(model, PeftModel):
        return LoraConfig()
    config = model.peft_config[model.active_adapters[0]]
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise OptionError(f"the model carries {config.peft_type} adapters; give a LoRA model, or the base with lora=")
    return config
