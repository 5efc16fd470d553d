"""The main job: ask a few warm-up steps which adapters matter. Read this file first.

plan = select(model, batches, lora=LoraConfig(r=8), keep=0.5)
model = plan.attach(model)                 # WeightLoRA: stock PEFT from here on
model = plan.expand().attach(model)        # WeightLoRA+: the same budget as plain LoRA
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from torch import nn
from tqdm import tqdm

from weightlora.cost.knapsack import CostBudget
from weightlora.cost.saved_bytes import Losses, parameter_cost, saved_cost
from weightlora.cost.step_time import time_cost
from weightlora.errors import OptionError
from weightlora.fast.dropout import Dropout
from weightlora.fast.enable import enable_fast_lora
from weightlora.model.distributed import from_first, make_whole, require_agreement
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.plan.budget import Keep, Limit, read_budget, read_limit, warmup_steps
from weightlora.plan.plan import AdapterPlan, base_model_name, make_plan
from weightlora.selection.rules.stoiht import Threshold
from weightlora.selection.stage import attach_plain_lora
from weightlora.selection.warmup import Loss, Rule, Stage, WarmupOptions, cycled, hear, in_parts, model_loss, peeked

#: Steps that a fresh head is trained alone where the user does not say.
HEAD_STEPS = 20


def select(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lora: LoraConfig | None = None,
    keep: Keep = 0.5,
    steps: int | None = None,
    seed: int = 0,
    loss_fn: Loss | None = None,
    rule: Rule = "first_order",
    head_steps: int | None = None,
    threshold_every: int = 1,
    threshold: Threshold = "magnitude",
    lr: float = 1e-3,
    gate_lr: float = 5.0,
    fast: Dropout | None = None,
    progress: bool = True,
) -> AdapterPlan:
    """Return the plan of the adapters that matter most; ``model`` is left bit for bit as it was.

    The warm-up puts plain LoRA on every candidate (see :func:`weightlora.find_sites`), hears one gate ω per site
    over ``steps`` batches and keeps the best within the budget. The paper's algorithm (section 2, phase 1) is
    ``rule="stoiht", head_steps=0``; docs/selection.md has the measurements behind the defaults.

    Args:
        model: A transformers model, a PEFT model with a LoRA adapter, or any module with linear layers; whole, or
            sharded by FSDP2's ``fully_shard``.
        batches: Dicts that the model is called with, such as a ``DataLoader`` yields; they are moved to the model's
            device. Fewer than needed are used again, with a warning. Several processes give each its own.
        lora: The adapters wanted. Every field but ``target_modules``, ``r``, ``lora_alpha`` and their patterns is
            carried unchanged into the final config. None takes the PEFT model's own config, else ``LoraConfig()``.
        keep: A fraction of the sites in (0, 1], a count, or a budget: ``"300k parameters"``, ``"512MB"`` (what is
            trained, with gradients and AdamW's state, and what is saved for the backward pass of the first batch) or
            ``"0.8x"`` (step time on the first batch, relative to LoRA on all sites). The two latter are those of
            plain LoRA with the step that ``fast`` says, and keep the sites of the highest total score within them;
            see docs/budgets.md.
        steps: T, warm-up steps for the gates, at least 2; None stands for 20.
        seed: Decides A's random start, dropout and a shuffling loader's order, whatever the global generators hold.
        loss_fn: ``loss_fn(model, batch)`` → scalar tensor, or an iterator over those of micro-batches, whose
            gradients add up; the default is ``model(**batch).loss``.
        rule: ``"first_order"`` averages ∂L/∂B over the batches while nothing moves and takes each gate's first-order
            gain; ``"stoiht"`` is the paper: A, B and ω move, ω under a hard threshold.
        head_steps: Steps in which the modules PEFT trains whole (``modules_to_save`` and the task's head) are
            trained alone before the gates are heard; 0 is the paper. None stands for 20 where there are such
            modules, else 0.
        threshold_every: Steps between thresholds under ``"stoiht"``: 1 is the paper, ``steps`` cuts once at the end.
        threshold: ``"magnitude"`` is the paper, ``"signed"`` the authors' code; see :func:`hard_threshold`.
        lr: AdamW's learning rate for head, A and B, constant; best the one of the training.
        gate_lr: η, the step size of ω under ``"stoiht"``; 5.0 as in the authors' code, the paper gives none.
        fast: The ``dropout`` of :func:`weightlora.enable_fast_lora`, under which the warm-up then runs and budgets in
            bytes or step time are measured; None is PEFT's step.
        progress: Show a bar where the output is a terminal.

    Raises:
        OptionError: An argument is out of its range.
        SiteError: There is nothing to adapt.
        SelectionError: The loss has no gradient or is not finite, no gate had a gradient, or too few sites survived.

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
    lora = deepcopy(_config_of(model) if lora is None else lora)
    options = WarmupOptions(
        rule=rule,
        steps=warmup_steps(None) if steps is None else steps,
        head_steps=head_steps or 0,
        threshold_every=threshold_every,
        threshold=threshold,
        lr=lr,
        gate_lr=gate_lr,
    )
    sites = find_sites(model, lora).sites
    budget = read_limit(keep) or read_budget(keep, adapter_parameters(sites, lora))
    loss_fn = loss_fn or model_loss

    with untouched(model, seed=seed), torch.inference_mode(False), torch.enable_grad():
        attached = attach_plain_lora(model, lora, sites)
        make_whole(attached)
        layers = lora_layers(attached)
        model.train()
        head = [p for n, p in attached.named_parameters() if p.requires_grad and ".lora_" not in n]
        if options.head_steps and not head:
            raise OptionError(f"head_steps={head_steps}, but PEFT trains no module whole; name it in modules_to_save")
        if head and head_steps is None:
            options = replace(options, head_steps=HEAD_STEPS)
        if fast is not None:
            enable_fast_lora(attached, fast)
        if isinstance(budget, Limit):
            first, batches = peeked(batches)
            with untouched(model, seed=seed):  # the gates are heard as if nothing had been measured
                budget = _measured(budget, attached, partial(in_parts, model, first, loss_fn), sites)
        total = options.head_steps + options.steps
        with tqdm(total=total, disable=None if progress else True, leave=False) as bar:
            stage = Stage(model, layers, head, cycled(batches, total), loss_fn, bar)
            heard = hear(stage, options, budget)
        require_agreement(repr((heard.kept, [site.name for site in sites])), "the choice")

    return make_plan(
        sites,
        lora,
        kept=[sites[i].name for i in heard.kept],
        scores=heard.scores,
        history=heard.history,
        rule=options.rule,
        options={
            "keep": keep,
            **{k: v for k, v in asdict(options).items() if k != "rule"},
            **({} if fast is None else {"fast": fast}),
            **({"cost": budget.price(heard.kept)} if isinstance(budget, CostBudget) else {}),
        },
        seed=seed,
        base_model=base_model_name(model),
    )


def _measured(limit: Limit, attached: nn.Module, losses: Losses, sites: Sequence[Site]) -> CostBudget:
    """What ``limit`` pays for, by a step of plain LoRA; the numbers of the first process count."""
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
            f"keep={limit.text!r} pays for no site: the cheapest, {sites[cost.cheapest].name}, takes {needed}; raise "
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
