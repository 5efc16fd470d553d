"""WeightLoRA+: the kept sites get the rank that the dropped sites freed (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.scoring import OPTIONS, Scoring, takes
from weightlora.selection.select import selected

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@takes(OPTIONS)
def build(**options: Any) -> Method:
    """Return the method.

    Args:
        options: Those of :func:`weightlora.select`. The limits are those before the ranks grow; the paper keeps
            n/2 adapters.

    Raises:
        OptionError: An argument is out of its range, or parameters are the only limit and no rule is named: then all
            sites are kept, and their ranks would grow to the user's again.
    """
    scoring = Scoring(**options)
    if scoring.scored_by is None:
        raise OptionError(
            f"weightlora_plus spends LoRA's whole budget on the kept sites, and {scoring.text} keeps all of them; "
            "limit adapters, time or memory, or take method weightlora"
        )

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan:
        return selected(model, batches, replace(scoring, lora=lora, total_steps=total_steps)).plan.expand()

    return ChoosingMethod(choose)
