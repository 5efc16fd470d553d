"""WeightLoRA: plain LoRA on the sites with the best scores (paper, section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightlora.methods.base import ChoosingMethod, Method, Prepared
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.scoring import OPTIONS, Scoring, takes
from weightlora.selection.select import selected

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@takes([*OPTIONS, "warm_start"])
def build(**options: Any) -> Method:
    """Return the method.

    Args:
        options: Those of :func:`weightlora.select`. ``warm_start`` trains the kept adapters and the head further from
            the scoring's weights, with a new optimizer. The default is the paper's: they are initialised again. The
            rule has to train adapters.

    Raises:
        OptionError: An argument is out of its range, or ``warm_start`` is asked of a rule that trains no adapters.
    """
    scoring = Scoring(**options)

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan | Prepared:
        trained = selected(model, batches, replace(scoring, lora=lora, total_steps=total_steps))
        return Prepared(trained.plan, trained.copy_into) if scoring.warm_start else trained.plan

    return ChoosingMethod(choose)
