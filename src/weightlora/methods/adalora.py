"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) on PEFT's layers; a callback calls PEFT's allocator.

ΔW = s·P·diag(e)·Q starts above the budget. The singular values e of the least important triplets, over all sites
together, are set to 0. How many are left follows a cubic curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError
from weightlora.methods.base import AttachedPlan, Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.methods.common.schedules import cubic_budget
from weightlora.methods.common.triplets import (
    Alpha,
    attach_triplets,
    export_triplets,
    plan_under,
    require_steps,
    triplet_plan,
)
from weightlora.model.distributed import copy_from_first, from_first, process_count
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import AdaLoraConfig, LoraConfig, PeftModel
    from torch import nn


@dataclass(frozen=True)
class _Options:
    init_r: int | None
    tinit: int | None
    tfinal: int | None
    deltaT: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    alpha: Alpha


def build(
    *,
    init_r: int | None = None,
    tinit: int | None = None,
    tfinal: int | None = None,
    deltaT: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.1,
    alpha: Alpha = "scale",
) -> Method:
    """Return the method; the names are those of PEFT's ``AdaLoraConfig``, the target rank is the budget's r.

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

    Raises:
        OptionError: An argument is out of its range.
    """
    if deltaT < 1:
        raise OptionError(f"deltaT={deltaT} is not allowed: give at least 1 step")
    return AdaLora(_Options(init_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight, alpha))


class AdaLora:
    """AdaLoRA as a method, and the mover that its callback calls."""

    _plan = AttachedPlan()

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._callback = _OnePenalty(self)
        self._mask: dict[str, Tensor] | None = None
        self.token_shares = 1
        """Processes over which the trainer averages the tokens of a step."""

    @property
    def plan(self) -> AdapterPlan:
        """The current ranks: pruned after each pruning, full before the first and between two of them."""
        return plan_under(self._plan, self._mask)

    def budget(self, step: int) -> int:
        """Return the cubic curve's value at steps that prune, and the starting ranks at the others."""
        config, pruned_for_good = self._config, self._total - self._config.tfinal
        prunes = config.tinit < step and step % config.deltaT == 0
        if not prunes and step < pruned_for_good:
            return self._high
        return cubic_budget(step, begin=config.tinit, end=pruned_for_good, high=self._high, low=self._low)

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put PEFT's AdaLoRA on all sites."""
        sites = find_sites(model, lora).sites
        alpha = self._options.alpha
        init_r = math.ceil(1.5 * lora.r) if self._options.init_r is None else self._options.init_r
        schedule = _schedule(self._options, total_steps)
        self._total, self._mask = total_steps, None
        self._low, self._high = len(sites) * lora.r, len(sites) * init_r
        record = {**schedule, "init_r": init_r, "alpha": alpha}
        self._plan = triplet_plan(model, lora, sites, init_r, rule="adalora", options=record)
        schedule["total_step"] = total_steps
        attached = attach_triplets(model, lora, sites, init_r=init_r, alpha=alpha, name="adalora", **schedule)
        self._tuner: Any = attached.base_model
        self._config: AdaLoraConfig = self._tuner.peft_config["default"]
        if process_count() > 1:
            self._tuner.register_forward_pre_hook(self._weigh_penalty, with_kwargs=True)
        self._remove_watch = warn_unless_begun([self._tuner, self._tuner.model], "adalora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that runs the allocator after each optimizer step."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the remaining triplets.

        Raises:
            SelectionError: More remain than the budget allows: the allocator was not called.
        """
        self._plan = export_triplets(model, self._plan, budget=self._low, name="adalora")
        self._mask = None
        self._remove_watch()
        return model

    def begin(self, total_steps: int) -> None:
        """Check that the training takes the steps that the schedule was made for.

        Raises:
            OptionError: The training takes more or fewer.
        """
        require_steps("adalora", self._total, total_steps)
        self._remove_watch()

    def before_step(self, step: int) -> None:
        """Do nothing."""

    def after_step(self, step: int) -> None:
        """Average the sensitivities and prune to the budget: PEFT's ``update_and_allocate``."""
        self._remove_watch()
        for name, parameter in self._tuner.model.named_parameters():
            if ".lora_" in name and parameter.grad is None:  # PEFT's averages need a gradient; zero counts as none
                parameter.grad = torch.zeros_like(parameter)
        final = step >= self._total - self._config.tfinal
        # With this pattern PEFT would cut the weights in a checkpoint, and triplets that may return would be lost.
        config = self._tuner.peft_config["default"]
        config.rank_pattern = self._pattern() if final and self._mask is not None else None
        self._tuner.update_and_allocate(step)
        found, config.rank_pattern = config.rank_pattern, None
        if found is not None and step <= self._total - self._config.tfinal:  # later the pattern stays the same
            found = from_first(partial(dict[str, list[bool]], found))
            copy_from_first([p for name, p in self._tuner.model.named_parameters() if ".lora_E." in name])
        self._mask = None if found is None else {_site(key): torch.tensor(mask) for key, mask in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the averages of every weight, and the mask."""
        allocator = self._tuner.rankallocator
        averages = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc, "mask": self._mask or {}}
        return {f"{kind} {name}": tensor for kind, named in averages.items() for name, tensor in named.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the averages and the mask."""
        allocator = self._tuner.rankallocator
        kinds: dict[str, dict[str, Tensor]] = {"ipt": {}, "unc": {}, "mask": {}}
        for key, tensor in state.items():
            kind, _, name = key.partition(" ")
            kinds[kind][name] = tensor
        weights = dict(self._tuner.model.named_parameters())
        for kind in ("ipt", "unc"):
            kinds[kind] = {name: tensor.to(weights[name].device) for name, tensor in kinds[kind].items()}
        allocator.exp_avg_ipt, allocator.exp_avg_unc = kinds["ipt"], kinds["unc"]
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in kinds["ipt"].items()}
        self._mask = kinds["mask"] or None

    def _weigh_penalty(self, _tuner: Any, _inputs: Any, named: dict[str, Any]) -> None:
        """Divide λ where the loss is a share of all processes' sum: the trainer multiplies it by their number."""
        shares = 1 if named.get("num_items_in_batch") is None else self.token_shares
        self._config.orth_reg_weight = self._options.orth_reg_weight / shares

    def _pattern(self) -> dict[str, list[bool]]:
        assert self._mask is not None
        return {f"{name}.lora_E.default": mask.tolist() for name, mask in self._mask.items()}


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


def _schedule(options: _Options, total_steps: int) -> dict[str, Any]:
    tfinal = total_steps // 10 if options.tfinal is None else options.tfinal
    tinit = tfinal // 4 if options.tinit is None else options.tinit
    if not 0 <= tinit < total_steps - tfinal <= total_steps:
        raise OptionError(
            f"tinit={tinit} and tfinal={tfinal} leave none of {total_steps} steps for pruning; lower them"
        )
    kept = ("deltaT", "beta1", "beta2", "orth_reg_weight")
    return {"tinit": tinit, "tfinal": tfinal, **{name: getattr(options, name) for name in kept}}


def _site(key: str) -> str:
    return key.removesuffix(".default").removesuffix(".lora_E")
