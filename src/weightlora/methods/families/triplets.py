"""Adapters as sums of triplets, ΔW = s·B·diag(e)·A, each of which can be switched off: PEFT's AdaLoRA layers.

AdaLoRA and Dynamic LoRA start with more triplets than the budget and set numbers e to 0. IncreLoRA starts with fewer
and trains further e later. The triplets that are on at the end become stock LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from weightlora.errors import OptionError
from weightlora.methods.base import Start, uniform_plan
from weightlora.methods.families.export import Factors
from weightlora.methods.families.moving import Attached, MovingMethod
from weightlora.model.layers import lora_layers
from weightlora.model.sites import tuner_fields

Alpha = Literal["scale", "keep"]


class TripletMethod(MovingMethod):
    """A method that moves ranks by switching triplets.

    Its option ``alpha`` is ``"scale"`` to scale each triplet by alpha/r as in plain LoRA, ``"keep"`` by alpha/init_r.
    """

    alpha: Alpha

    def _triplets(self, start: Start, init_r: int, options: Mapping[str, Any], **schedule: Any) -> Attached:
        """Put ``init_r`` triplets with e = 0 on each site.

        Args:
            start: The base model, the budget and all sites.
            init_r: Triplets of a site.
            options: What the plan records.
            schedule: Further fields of PEFT's ``AdaLoraConfig``.

        Raises:
            OptionError: The budget differs between sites, or ``init_r`` leaves nothing to switch off.
        """
        lora = start.lora
        plan = uniform_plan(start, r=init_r, alpha=lora.lora_alpha, rule=self.name, options=options)
        require_wider(init_r, lora.r)
        config = AdaLoraConfig(
            init_r=init_r,
            target_r=lora.r,
            lora_alpha=lora.lora_alpha * init_r / lora.r if self.alpha == "scale" else lora.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=lora.lora_dropout,
            total_step=self._total,
            **tuner_fields(lora, start.sites),
            **schedule,
        )
        attached: Any = get_peft_model(start.model, config)  # pyright: ignore[reportArgumentType]
        layers: dict[str, Any] = dict(lora_layers(attached))
        for layer in layers.values():
            # With a bf16 base or one on a GPU, PEFT makes a new parameter of it that would be trained and not saved.
            count = layer.ranknum["default"].detach().float().fill_(init_r)
            layer.ranknum["default"] = nn.Parameter(count, requires_grad=False)
        return plan, attached

    def _factors(self, layer: Any, mask: Tensor | None) -> Factors:  # noqa: ARG002 - e says what is on
        """Return B·diag(e)·A of the triplets with e ≠ 0, times PEFT's scale alpha/(init_r + 1e-5)."""
        a, b, e = (matrix["default"].detach() for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
        kept = e.flatten() != 0
        return Factors((e * a)[kept], b[:, kept], layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5))


def require_wider(init_r: int, r: int) -> None:
    """Raise unless pruning from ``init_r`` leaves ``r``.

    Raises:
        OptionError: It is not larger.
    """
    if init_r <= r:
        raise OptionError(f"init_r={init_r} is not allowed: give more than r={r}, the rank at the end")
