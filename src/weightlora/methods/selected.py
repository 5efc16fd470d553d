"""The project's own choice: plain LoRA on what a selection keeps within the limits."""

from __future__ import annotations

from typing import Any

from weightlora.methods.base import Method
from weightlora.methods.families.selecting import SelectingMethod
from weightlora.selection.scoring import OPTIONS, Scoring, takes


@takes([*OPTIONS, "warm_start"])
def build(**options: Any) -> Method:
    """Return the method.

    Args:
        options: Those of :func:`weightlora.select`. ``warm_start`` trains the kept adapters and the head further from
            the scoring's weights, with a new optimizer; by default they are initialised again. The rule has to train
            adapters.

    Raises:
        OptionError: An argument is out of its range, or ``warm_start`` is asked of a rule that trains no adapters.
    """
    return SelectingMethod(Scoring(**options))
