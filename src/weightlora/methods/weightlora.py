"""WeightLoRA, the paper's algorithm (section 2): the first T steps of the training choose K adapters by their gates.

The gates are in ``selection/rules/paper.py``. ``examples/weightlora_from_scratch.py`` says all of it in plain PyTorch.
"""

from __future__ import annotations

from weightlora.methods.families.selecting import GatedMethod


class WeightLora(GatedMethod):
    """WeightLoRA: the K adapters with the largest gates, at LoRA's rank."""


build = WeightLora
