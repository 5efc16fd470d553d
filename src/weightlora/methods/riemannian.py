"""Riemannian preconditioning (Zhang and Pilanci 2024, arXiv:2402.02347): LoRA with gradients scaled by A and B.

Before each step, ∂L/∂A ← (BᵀB + δ·I)⁻¹·∂L/∂A and ∂L/∂B ← ∂L/∂B·(AAᵀ + δ·I)⁻¹; then any optimizer. PEFT's
``create_riemannian_optimizer`` does the same inside an optimizer of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightlora.errors import SelectionError
from weightlora.methods.base import Start, recorded
from weightlora.methods.families.moving import Attached, MovingMethod
from weightlora.model.distributed import copy_from_first
from weightlora.plan.card import base_model_name
from weightlora.plan.plan import make_plan
from weightlora.validation import Positive

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(kw_only=True, eq=False)
class Riemannian(MovingMethod):
    """Plain LoRA on all sites; it changes gradients, not ranks.

    Args:
        reg: δ, added to the diagonal of BᵀB and AAᵀ before they are inverted, since B starts at zero; PEFT's default.
    """

    reg: Positive = 1e-2
    name = "riemannian"

    def _start(self, start: Start) -> Attached:
        names, base = [site.name for site in start.sites], base_model_name(start.model)
        plan = make_plan(start.sites, start.lora, names, rule=self.name, options=recorded(self), base_model=base)
        return plan, plan.attach(start.model)

    def before_training(self, total_steps: int) -> None:
        """Record that the callback runs; there is no schedule."""
        self._total = total_steps
        super().before_training(total_steps)

    def before_step(self, step: int) -> None:  # noqa: ARG002 - all steps are alike
        """Precondition the gradients, after clipping."""
        for layer in self._layers.values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if a.grad is not None and b.grad is not None:
                a.grad, b.grad = preconditioned(a, b, a.grad, b.grad, self.reg)
                copy_from_first([a.grad, b.grad])  # solvers of two devices may round differently

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


build = Riemannian


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
