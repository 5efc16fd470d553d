"""What a scoring trained: the plan, and the weights from which the training of its adapters can go on.

trained = select_trained(model, batches, rule="integrated", lora=lora, adapters=0.5)
model = trained.attach(model)  # the adapters as they were at the end of the scoring; stock PEFT from here on

Where the scoring took the first steps of the training, :class:`Begun` is what the training goes on with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightlora.errors import OptionError
from weightlora.model.layers import lora_layers
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    from weightlora.selection.stage import OptimizerStep

#: Values with which the final adapters compute what the scoring's did: ΔW = s·B·A on the unchanged base weights.
_PLAIN = {"init_lora_weights": (True, False, "gaussian"), "use_dora": (False,), "layer_replication": (None,)}


@dataclass(frozen=True, eq=False)
class Trained:
    """A plan with the weights that the scoring trained; all tensors are copies on the CPU."""

    plan: AdapterPlan
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    """A and B of each kept site; B is multiplied by the site's gate where the rule has gates."""
    head: Mapping[str, Tensor]
    """The modules that PEFT trains whole, by the parameters' names in the PEFT model."""
    begun: Begun | None = None
    """Where the training stands that the scoring began; None where it is no part of one."""

    def attach(self, model: nn.Module) -> PeftModel:
        """Put the plan's adapters into ``model``, with the weights that the scoring trained.

        Raises:
            PlanMismatchError: The model lacks planned sites, or has them in other shapes.
        """
        attached = self.plan.attach(model)
        self.copy_into(attached)
        return attached

    @torch.no_grad()
    def copy_into(self, attached: PeftModel) -> None:
        """Overwrite A, B and the head of a model that carries the plan.

        Raises:
            PlanMismatchError: The model does not carry the plan.
        """
        self.plan.check(attached)
        layers: dict[str, Any] = dict(lora_layers(attached))
        for name, (a, b) in self.adapters.items():
            layers[name].lora_A["default"].weight.copy_(a)
            layers[name].lora_B["default"].weight.copy_(b)
        parameters = dict(attached.named_parameters())
        for name, value in self.head.items():
            parameters[name].copy_(value)


def adapter_copies(
    layers: Mapping[str, LoraLayer], gates: Sequence[float] | None, kept: Mapping[int, Sequence[int] | None]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and ω·B of the kept sites, as copies on the CPU.

    Args:
        layers: All sites that were scored.
        gates: ω of each site; None where the rule has no gates.
        kept: Positions of the sites that the plan keeps, and which of its ranks each keeps; None stands for all.
    """
    named: list[tuple[str, Any]] = list(layers.items())
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for i in sorted(kept):
        name, layer = named[i]
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        ranks = kept[i]
        if ranks is not None:
            a, b = a[list(ranks)], b[:, list(ranks)]
        copies[name] = (a.cpu().clone(), (b * (1.0 if gates is None else gates[i])).cpu())
    return copies


def head_copies(attached: nn.Module, head: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """Return the parameters ``head`` of ``attached`` by their names, as copies on the CPU."""
    wanted = set(map(id, head))
    return {name: p.detach().cpu().clone() for name, p in attached.named_parameters() if id(p) in wanted}


def require_plain(lora: LoraConfig) -> None:
    """Raise unless the final adapters compute the same with the weights of the scoring as plain LoRA did.

    Raises:
        OptionError: With the field of ``lora`` and what is allowed.
    """
    for name, allowed in _PLAIN.items():
        found = getattr(lora, name)
        if found not in allowed:
            raise OptionError(
                f"warm_start=True: the scoring trains plain LoRA, and {name}={found!r} makes other adapters of its "
                f"weights; give {' or '.join(map(repr, allowed))}, or leave warm_start out"
            )


# -- the first steps of the training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begun:
    """Where a training stands after its first steps."""

    steps: int
    """Optimizer steps taken."""
    optimizer: Mapping[str, Mapping[str, Any]]
    """The optimizer's state of each parameter that goes on, by the parameter's name; tensors are copies on the CPU."""
    scheduler: Mapping[str, Any]
    """The schedule's state; empty where it has none."""


def begun_by(run: OptimizerStep, attached: nn.Module, kept: Sequence[nn.Parameter], steps: int) -> Begun:
    """Return where the training stands; of the parameters of ``attached`` it goes on with ``kept``."""
    state, scheduler = run.optimizer.state, {} if run.scheduler is None else run.scheduler.state_dict()
    wanted = {id(p) for p in kept if p in state}
    own = {name: state[p] for name, p in attached.named_parameters() if id(p) in wanted}
    copies = {
        name: {key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in of.items()}
        for name, of in own.items()
    }
    return Begun(steps, copies, deepcopy(scheduler))
