"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512), on PEFT's, with its allocator really called.

ΔW = s·P·diag(e)·Q starts above the budget; singular values e whose triplets matter least are set to 0, over all sites
together, along a cubic budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from weightlora.budget import cubic_budget
from weightlora.errors import OptionError, SelectionError
from weightlora.gates import lora_layers
from weightlora.methods.base import Method
from weightlora.moving import MoverCallback, warn_unless_begun
from weightlora.plan import AdapterPlan, base_model_name, make_plan
from weightlora.sites import Site, find_sites
from weightlora.stock import Factors, become_stock, factors_plan

if TYPE_CHECKING:
    from peft import LoraConfig
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
    alpha: Literal["scale", "keep"]


def build(
    *,
    init_r: int | None = None,
    tinit: int | None = None,
    tfinal: int | None = None,
    deltaT: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.1,
    alpha: Literal["scale", "keep"] = "scale",
) -> Method:
    """Return the method; the names are those of PEFT's ``AdaLoraConfig``, the target rank is the budget's r.

    Args:
        init_r: Rank that every site starts with; None stands for 1.5·r, rounded up.
        tinit: Steps before anything is pruned; None stands for a quarter of ``tfinal``.
        tfinal: Last steps, in which the ranks stay; None stands for a tenth of all.
        deltaT: Steps between prunings; in between, what was pruned may come back.
        beta1: Average of the sensitivity |w·∂L/∂w|.
        beta2: Average of its uncertainty.
        orth_reg_weight: λ of the penalty that keeps P and Q orthogonal; it is in ``outputs.loss`` alone, so a loss of
            your own goes without. PEFT has 0.5, the authors 0.1.
        alpha: ``"scale"`` gives every rank the strength alpha/r of plain LoRA, ``"keep"`` is alpha/init_r.

    Raises:
        OptionError: An argument is out of its range.
    """
    if deltaT < 1:
        raise OptionError(f"deltaT={deltaT} is not allowed: give at least 1 step")
    if alpha not in ("scale", "keep"):
        raise OptionError(f"alpha={alpha!r} is not allowed: give 'scale' or 'keep'")
    return AdaLora(_Options(init_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight, alpha))


class AdaLora:
    """The method, and its own mover."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._callback = MoverCallback(self)

    @property
    def plan(self) -> AdapterPlan:
        """Ranks as they are: all before the first pruning and between two of them, the pruned ones after each."""
        if self._mask is None:
            return self._plan
        kept = {name: int(mask.sum()) for name, mask in self._mask.items()}
        return replace(self._plan, entries=tuple(replace(e, r=kept[e.site.name]) for e in self._plan.entries))

    def budget(self, step: int) -> int:
        """The cubic curve at the steps that prune, the starting ranks at those that do not."""
        config, pruned_for_good = self._config, self._total - self._config.tfinal
        prunes = config.tinit < step and step % config.deltaT == 0
        if not prunes and step < pruned_for_good:
            return self._high
        return cubic_budget(step, begin=config.tinit, end=pruned_for_good, high=self._high, low=self._low)

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put PEFT's AdaLoRA on all sites."""
        sites = find_sites(model, lora).sites
        self._total = total_steps
        self._config = _adalora_config(lora, sites, self._options, total_steps)
        self._low, self._high = len(sites) * lora.r, len(sites) * self._config.init_r
        self._mask: dict[str, Tensor] | None = None
        plan = make_plan(
            sites,
            lora,
            [s.name for s in sites],
            rule="adalora",
            options=_record(self._config, self._options),
            base_model=base_model_name(model),
        )
        scale = self._config.lora_alpha / self._config.init_r
        shapes = {s.name: Factors(torch.empty(self._config.init_r, 0), torch.empty(0), scale) for s in sites}
        self._plan = factors_plan(plan, shapes)
        attached: Any = get_peft_model(model, self._config)  # pyright: ignore[reportArgumentType]
        layers: dict[str, Any] = dict(lora_layers(attached))
        for layer in layers.values():
            # Under a bf16 base, or one on a GPU, PEFT makes a new parameter of it, which would be trained, not saved.
            layer.ranknum["default"] = torch.nn.Parameter(
                layer.ranknum["default"].detach().float().fill_(self._config.init_r), requires_grad=False
            )
        self._tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([self._tuner, self._tuner.model], "adalora")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """The allocator, once an optimizer step."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the triplets that are left.

        Raises:
            SelectionError: More are left than the budget allows: the allocator was not called.
        """
        layers: dict[str, Any] = dict(lora_layers(model))
        factors = {name: _factors(layer) for name, layer in layers.items()}
        ranks = sum(factor.rank for factor in factors.values())
        if ranks > self._low:
            raise SelectionError(
                f"adalora has {ranks} ranks left, {self._low} are the budget: its allocator did not run to the end; "
                "give the trainer callbacks=method.callbacks(), and train all of the steps"
            )
        self._plan, self._mask = factors_plan(self._plan, factors), None
        self._remove_watch()
        return become_stock(model, self._plan, factors)

    def begin(self, total_steps: int) -> None:
        """The schedule is made for a number of steps, and no other.

        Raises:
            OptionError: The training takes more or fewer.
        """
        if total_steps != self._total:
            raise OptionError(
                f"adalora was attached for {self._total} steps and the training takes {total_steps}; attach it with "
                "the number of optimizer steps"
            )
        self._remove_watch()

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int) -> None:
        """Average the sensitivities and prune to the budget: PEFT's ``update_and_allocate``."""
        self._remove_watch()
        for name, parameter in self._tuner.model.named_parameters():
            if ".lora_" in name and parameter.grad is None:  # PEFT's averages need one; no gradient, no sensitivity
                parameter.grad = torch.zeros_like(parameter)
        final = step >= self._total - self._config.tfinal
        # PEFT would cut the weights in a checkpoint down to this pattern, and what may still come back is lost.
        config = self._tuner.peft_config["default"]
        config.rank_pattern = self._pattern() if final and self._mask is not None else None
        self._tuner.update_and_allocate(step)
        found, config.rank_pattern = config.rank_pattern, None
        self._mask = None if found is None else {_site(key): torch.tensor(mask) for key, mask in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Averages of every weight, and the mask."""
        allocator = self._tuner.rankallocator
        averages = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc, "mask": self._mask or {}}
        return {f"{kind} {name}": tensor for kind, named in averages.items() for name, tensor in named.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the averages and the mask."""
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

    def _pattern(self) -> dict[str, list[bool]]:
        assert self._mask is not None
        return {f"{name}.lora_E.default": mask.tolist() for name, mask in self._mask.items()}


def _adalora_config(lora: LoraConfig, sites: Sequence[Site], options: _Options, total_steps: int) -> AdaLoraConfig:
    if lora.rank_pattern or lora.alpha_pattern or lora.use_dora or lora.use_rslora:
        raise OptionError("adalora gives every site the same init_r and alpha; leave out patterns, rsLoRA and DoRA")
    init_r = math.ceil(1.5 * lora.r) if options.init_r is None else options.init_r
    if init_r <= lora.r:
        raise OptionError(
            f"init_r={init_r} is not allowed: give more than r={lora.r}, which is what is left at the end"
        )
    tfinal = total_steps // 10 if options.tfinal is None else options.tfinal
    tinit = tfinal // 4 if options.tinit is None else options.tinit
    if not 0 <= tinit < total_steps - tfinal <= total_steps:
        raise OptionError(
            f"tinit={tinit} and tfinal={tfinal} leave none of {total_steps} steps to prune in; lower them"
        )
    return AdaLoraConfig(
        task_type=lora.task_type,
        target_modules="|".join(re.escape(site.name) for site in sites),
        init_r=init_r,
        target_r=lora.r,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=options.deltaT,
        beta1=options.beta1,
        beta2=options.beta2,
        orth_reg_weight=options.orth_reg_weight,
        total_step=total_steps,
        lora_alpha=lora.lora_alpha * init_r / lora.r if options.alpha == "scale" else lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.lora_dropout,
        fan_in_fan_out=lora.fan_in_fan_out,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
    )


def _record(config: AdaLoraConfig, options: _Options) -> dict[str, Any]:
    names = ("init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    return {**{name: getattr(config, name) for name in names}, "alpha": options.alpha}


def _factors(layer: Any) -> Factors:
    """B·diag(e)·A of the triplets with e ≠ 0, times PEFT's scale alpha/(init_r + 1e-5)."""
    a, b, e = (matrix["default"].detach() for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    kept = e.flatten() != 0
    return Factors((e * a)[kept], b[:, kept], layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5))


def _site(key: str) -> str:
    return key.removesuffix(".default").removesuffix(".lora_E")
