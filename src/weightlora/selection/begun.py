"""The first steps of a training, taken while sites were scored: what the training goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from weightlora.selection.stage import OptimizerStep


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
