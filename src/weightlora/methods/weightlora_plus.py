"""WeightLoRA+: the kept sites get the rank that the dropped sites freed (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from weightlora.fast.dropout import Dropout
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.plan.budget import Keep, check_keep
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.ranking import Ranking, check_ranking
from weightlora.selection.batches import Loss
from weightlora.selection.rules import rule_of
from weightlora.selection.rules.base import Rule
from weightlora.selection.select import require_warmup, select
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
    alpha: Literal["scale", "keep"] = "scale",
    loss_fn: Loss | None = None,
    fast: Dropout | None = None,
    progress: bool = True,
) -> Method:
    """Return the method; its arguments are those of :func:`weightlora.select`, and ``alpha``.

    Args:
        keep: How much of plain LoRA is kept before the ranks grow; the paper keeps n/2 adapters.
        rule: How sites are scored.
        ranking: How sites compete for the budget; None: as the rule says.
        steps: T; None stands for 0.5 % of the training's steps, at least the rule's own; ``"auto"``: until the
            choice is stable.
        lr: The warm-up's learning rate.
        head_lr: That of a new head in the warm-up; None stands for ``lr``.
        seed: Decides all random numbers of the warm-up.
        alpha: As in :meth:`weightlora.AdapterPlan.expand`.
        loss_fn: The loss of a batch.
        fast: The ``dropout`` of the fast step.
        progress: Show a bar.
    """
    check_keep(keep)
    check_ranking(ranking)
    require_warmup(steps=steps, lr=lr, head_lr=head_lr)
    warmup = {"lr": lr, "head_lr": head_lr, "seed": seed, "loss_fn": loss_fn, "fast": fast, "progress": progress}
    chosen = partial(select, keep=keep, rule=rule_of(rule), ranking=ranking, steps=steps, **warmup)

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan:
        plan = chosen(model, batches, lora=lora, total_steps=total_steps)
        return plan.expand(alpha=alpha)

    return ChoosingMethod(choose)
