"""WeightLoRA: plain LoRA on the sites with the best scores (paper, section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightlora.fast.dropout import Dropout
from weightlora.methods.base import ChoosingMethod, Method, Prepared
from weightlora.plan.budget import Keep, check_keep
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.ranking import Ranking, check_ranking
from weightlora.selection.batches import Loss
from weightlora.selection.rules import require_training_rule, rule_of
from weightlora.selection.rules.base import Rule, require
from weightlora.selection.select import require_warmup, select, select_trained
from weightlora.selection.steps import Steps

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(
    *,
    keep: Keep = 0.5,
    rule: str | Rule = "first_order",
    ranking: Ranking | None = None,
    steps: Steps | None = None,
    lr: float = 1e-3,
    head_lr: float | None = None,
    seed: int = 0,
    loss_fn: Loss | None = None,
    fast: Dropout | None = None,
    progress: bool = True,
    warm_start: bool = False,
) -> Method:
    """Return the method; its arguments are those of :func:`weightlora.select`, and ``warm_start``.

    Args:
        keep: How much of plain LoRA is kept.
        rule: How sites are scored.
        ranking: How sites compete for the budget; None: as the rule says.
        steps: T; None stands for 0.5 % of the training's steps, at least the rule's own; ``"auto"``: until the
            choice is stable.
        lr: The warm-up's learning rate.
        head_lr: That of a new head in the warm-up; None stands for ``lr``.
        seed: Decides all random numbers of the warm-up.
        loss_fn: The loss of a batch.
        fast: The ``dropout`` of the fast step.
        progress: Show a bar.
        warm_start: Train the kept adapters and the head further from the warm-up's weights, with a new optimizer. The
            default is the paper's: they are initialised again. The rule has to train adapters.

    Raises:
        OptionError: An argument is out of its range, or ``warm_start`` is asked of a rule that trains no adapters.
    """
    check_keep(keep)
    check_ranking(ranking)
    require_warmup(steps=steps, lr=lr, head_lr=head_lr)
    require(isinstance(warm_start, bool), f"warm_start={warm_start!r}", "true or false")  # pyright: ignore[reportUnnecessaryIsInstance]
    scored_by = rule_of(rule)
    if warm_start:
        require_training_rule(scored_by)
    warmup = {"lr": lr, "head_lr": head_lr, "seed": seed, "loss_fn": loss_fn, "fast": fast, "progress": progress}
    asked: dict[str, Any] = {"keep": keep, "rule": scored_by, "ranking": ranking, "steps": steps, **warmup}

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan | Prepared:
        given: dict[str, Any] = {**asked, "lora": lora, "total_steps": total_steps}
        if not warm_start:
            return select(model, batches, **given)
        trained = select_trained(model, batches, **given)
        return Prepared(trained.plan, trained.copy_into)

    return ChoosingMethod(choose)
