"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) on PEFT's layers; a callback calls PEFT's allocator.

ΔW = s·P·diag(e)·Q starts above the budget. The singular values e of the least important triplets, over all sites
together, are set to 0. How many are left follows a cubic curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError
from weightlora.methods.base import Start
from weightlora.methods.families.moving import Attached, MoverCallback, packed, unpacked
from weightlora.methods.families.triplets import Alpha, TripletMethod
from weightlora.model.distributed import copy_from_first, from_first, process_count
from weightlora.validation import Count, Natural, NotNegative, Share

if TYPE_CHECKING:
    from peft import AdaLoraConfig


@dataclass(kw_only=True, eq=False)
class AdaLora(TripletMethod):
    """AdaLoRA; the names of its options are those of PEFT's ``AdaLoraConfig``, the target rank is the budget's r.

    Args:
        init_r: Rank of every site at the start. None: 1.5·r, rounded up.
        tinit: Steps before the first pruning. None: a quarter of ``tfinal``.
        tfinal: Steps at the end in which the ranks stay fixed. None: a tenth of all.
        deltaT: Steps between prunings. In between, pruned triplets may return.
        beta1: Decay of the average sensitivity |w·∂L/∂w|.
        beta2: Decay of the average of its uncertainty.
        orth_reg_weight: λ of the penalty that keeps P and Q orthogonal. PEFT adds it to ``outputs.loss``; a loss
            function of your own does not include it. PEFT has 0.5, the authors 0.1.
        alpha: ``"scale"`` scales every rank by alpha/r as in plain LoRA, ``"keep"`` by alpha/init_r.
    """

    init_r: Count | None = None
    tinit: Natural | None = None
    tfinal: Natural | None = None
    deltaT: Count = 10
    beta1: Share = 0.85
    beta2: Share = 0.85
    orth_reg_weight: NotNegative = 0.1
    alpha: Alpha = "scale"
    name = "adalora"
    token_shares = 1
    """Processes over which the trainer averages the tokens of a step."""

    def most_ranks(self, step: int) -> int:
        """Return the cubic curve's value at steps that prune, and the starting ranks at the others."""
        config, pruned_for_good = self._config, self._total - self._config.tfinal
        prunes = config.tinit < step and step % config.deltaT == 0
        if not prunes and step < pruned_for_good:
            return self._high
        return cubic_budget(step, begin=config.tinit, end=pruned_for_good, high=self._high, low=self._low)

    def _start(self, start: Start) -> Attached:
        init_r = math.ceil(1.5 * start.lora.r) if self.init_r is None else self.init_r
        schedule, self._high = self._schedule(), len(start.sites) * init_r
        options = {**schedule, "init_r": init_r, "alpha": self.alpha}
        plan, attached = self._triplets(start, init_r, options, **schedule)
        self._mask: Mapping[str, Tensor] | None = None
        self._tuner: Any = attached.base_model
        self._config: AdaLoraConfig = self._tuner.peft_config["default"]
        if process_count() > 1:
            self._tuner.register_forward_pre_hook(self._weigh_penalty, with_kwargs=True)
        return plan, attached

    def _schedule(self) -> dict[str, Any]:
        tfinal = self._total // 10 if self.tfinal is None else self.tfinal
        tinit = tfinal // 4 if self.tinit is None else self.tinit
        if not 0 <= tinit < self._total - tfinal <= self._total:
            raise OptionError(
                f"tinit={tinit} and tfinal={tfinal} leave none of {self._total} steps for pruning; lower them"
            )
        decays = {"beta1": self.beta1, "beta2": self.beta2, "orth_reg_weight": self.orth_reg_weight}
        return {"tinit": tinit, "tfinal": tfinal, "deltaT": self.deltaT, **decays}

    def _in_force(self) -> Mapping[str, Tensor] | None:
        """Return what the last pruning left; None before the first and between two of them."""
        return self._mask

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that runs the allocator after each optimizer step."""
        return [_OnePenalty(self)]

    def after_step(self, step: int) -> None:
        """Average the sensitivities and prune to the budget: PEFT's ``update_and_allocate``."""
        for name, parameter in self._tuner.model.named_parameters():
            if ".lora_" in name and parameter.grad is None:  # PEFT's averages need a gradient; zero counts as none
                parameter.grad = torch.zeros_like(parameter)
        last, mask = self._total - self._config.tfinal, self._mask
        # With this pattern PEFT would cut the weights in a checkpoint, and triplets that may return would be lost.
        config = self._tuner.peft_config["default"]
        config.rank_pattern = None
        if step >= last and mask is not None:
            config.rank_pattern = {f"{name}.lora_E.default": live.tolist() for name, live in mask.items()}
        self._tuner.update_and_allocate(step)
        found, config.rank_pattern = config.rank_pattern, None
        if found is not None and step <= last:  # later the pattern stays the same
            found = from_first(partial(dict[str, list[bool]], found))
            copy_from_first([p for name, p in self._tuner.model.named_parameters() if ".lora_E." in name])
        self._mask = None if found is None else {_site(key): torch.tensor(mask) for key, mask in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the averages of every weight, and the mask."""
        allocator = self._tuner.rankallocator
        return packed(ipt=allocator.exp_avg_ipt, unc=allocator.exp_avg_unc, mask=self._mask or {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the averages and the mask."""
        *averages, mask = unpacked(state, "ipt", "unc", "mask")
        allocator, weights = self._tuner.rankallocator, dict(self._tuner.model.named_parameters())
        allocator.exp_avg_ipt, allocator.exp_avg_unc = (
            {name: tensor.to(weights[name].device) for name, tensor in average.items()} for average in averages
        )
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in allocator.exp_avg_ipt.items()}
        self._mask = mask or None

    def _weigh_penalty(self, _tuner: Any, _inputs: Any, named: dict[str, Any]) -> None:
        """Divide λ where the loss is a share of all processes' sum: the trainer multiplies it by their number."""
        shares = 1 if named.get("num_items_in_batch") is None else self.token_shares
        self._config.orth_reg_weight = self.orth_reg_weight / shares


build = AdaLora


class _OnePenalty(MoverCallback):
    """Tells the method how the trainer averages, so that the penalty counts once and not once a process."""

    def __init__(self, mover: AdaLora) -> None:
        super().__init__(mover)
        self._method = mover

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start as every mover does, and look at the trainer's averaging."""
        self._method.token_shares = process_count() if args.average_tokens_across_devices else 1
        super().on_train_begin(args, state, control, **kwargs)


def cubic_budget(step: int, *, begin: int, end: int, high: int, low: int) -> int:
    """Return the ranks at ``step`` on a cubic curve from ``high`` at ``begin`` to ``low`` at ``end``, fast at first.

    low + (high − low)·(1 − (step − begin)/(end − begin))³, rounded down (AdaLoRA, Zhang et al. 2023, section 3.3).

    Example:
        >>> [cubic_budget(step, begin=10, end=20, high=80, low=16) for step in (5, 10, 15, 20, 30)]
        [80, 80, 24, 16, 16]
    """
    left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
    return int((high - low) * left**3 + low)


def _site(key: str) -> str:
    return key.removesuffix(".default").removesuffix(".lora_E")
