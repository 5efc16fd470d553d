"""Riemannian preconditioning (Zhang and Pilanci 2024, arXiv:2402.02347): LoRA with gradients scaled by A and B.

Before each step, ∂L/∂A ← (BᵀB + δ·I)⁻¹·∂L/∂A and ∂L/∂B ← ∂L/∂B·(AAᵀ + δ·I)⁻¹; then any optimizer. PEFT's
``create_riemannian_optimizer`` does the same inside an optimizer of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import AttachedPlan, Method
from weightlora.methods.common.callback import MoverCallback, warn_unless_begun
from weightlora.model.distributed import copy_from_first
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn


def build(*, reg: float = 1e-2) -> Method:
    """Return the method.

    Args:
        reg: δ, added to the diagonal of BᵀB and AAᵀ before they are inverted; PEFT's default.

    Raises:
        OptionError: δ is not positive.
    """
    if not reg > 0:
        raise OptionError(f"reg={reg} is not allowed: give a positive number, B starts at zero")
    return Riemannian(reg)


class Riemannian:
    """The method, and the mover that its callback calls: it changes gradients, not ranks."""

    _plan = AttachedPlan()

    def __init__(self, reg: float) -> None:
        self._reg = reg
        self._callback = MoverCallback(self)

    @property
    def plan(self) -> AdapterPlan:
        """Plain LoRA on all sites."""
        return self._plan

    def budget(self, step: int) -> int:  # noqa: ARG002 - the same at every step
        """Return plain LoRA's ranks."""
        return sum(entry.lora_r for entry in self._plan.entries)

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put plain LoRA on all sites."""
        sites = find_sites(model, lora).sites
        names, options = [site.name for site in sites], {"reg": self._reg}
        self._plan = make_plan(
            sites, lora, names, rule="riemannian", options=options, base_model=base_model_name(model)
        )
        attached = self._plan.attach(model)
        self._layers: dict[str, Any] = dict(lora_layers(attached))
        self._begun = False
        tuner: Any = attached.base_model
        self._remove_watch = warn_unless_begun([tuner, tuner.model], "riemannian")
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that runs between the backward pass and the optimizer's step."""
        return [self._callback]

    def export(self, model: PeftModel) -> PeftModel:
        """Return the model, which is stock LoRA already.

        Raises:
            SelectionError: It was trained without the preconditioner.
        """
        if not self._begun:
            raise SelectionError(
                "this is plain LoRA: riemannian's callback did not run; give the trainer callbacks=method.callbacks()"
            )
        self._plan.check(model)
        return model

    def begin(self, total_steps: int) -> None:  # noqa: ARG002 - there is no schedule
        """Record that the callback runs."""
        self._begun = True
        self._remove_watch()

    def before_step(self, step: int) -> None:  # noqa: ARG002 - all steps are alike
        """Precondition the gradients, after clipping."""
        for layer in self._layers.values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if a.grad is not None and b.grad is not None:
                a.grad, b.grad = preconditioned(a, b, a.grad, b.grad, self._reg)
                copy_from_first([a.grad, b.grad])  # solvers of two devices may round differently

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the method has no state."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Do nothing: the method has no state."""


@torch.no_grad()
def preconditioned(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, reg: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of A (r, in) and B (out, r) in the metric of the paper, in fp32 or wider.

    Example:
        >>> one = torch.eye(2)
        >>> preconditioned(one, 0 * one, one, one, reg=1.0)[1]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    damping = reg * torch.eye(len(a), device=a.device, dtype=wide)
    of_a, of_b = a.to(wide) @ a.to(wide).T + damping, b.to(wide).T @ b.to(wide) + damping
    new_a = torch.linalg.solve(of_b, grad_a.to(wide))
    new_b = torch.linalg.solve(of_a, grad_b.to(wide), left=False)
    return new_a.to(grad_a.dtype), new_b.to(grad_b.dtype)
