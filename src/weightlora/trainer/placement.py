"""Where the weights of a trainer's model are before it trains: whole on every process, or elsewhere.

DDP copies, FSDP and DeepSpeed part the model when the training starts, so that a warm-up before it finds it whole;
two settings part it as it is loaded.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from weightlora.errors import OptionError
from weightlora.model.distributed import has_shards


def is_parted(trainer: Trainer) -> bool:
    """Whether a process has only parts of the trained matrices or of their gradients."""
    model: Any = trainer.model
    parallel = trainer.args.parallelism_config is not None or has_shards(model)
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or parallel)


def require_weights(trainer: Trainer) -> None:
    """Raise where a process does not have the weights, which a forward pass before the training needs.

    Raises:
        OptionError: With the two steps that do without it.
    """
    if _loads_on_first(trainer):
        raise OptionError(
            "FSDP's cpu_ram_efficient_loading leaves the weights on the first process, but the warm-up needs them: run "
            "`weightlora select` in one process first, then `weightlora train --plan plan.json` with all of them "
            "(docs/guides/distributed.md)"
        )


def require_heads(trainer: Trainer) -> None:
    """Raise where a module that is trained whole has no weights on some processes.

    Accelerate finds the optimizer's tensors again by their addresses, and those without weights all have the same.

    Raises:
        OptionError: With the module and the setting.
    """
    model: Any = trainer.model
    whole = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if whole and _loads_on_first(trainer):
        raise OptionError(
            f"FSDP's cpu_ram_efficient_loading leaves {whole[0]} without weights on all processes but the first, where "
            "it would not be trained; set it to false"
        )


def require_measurable(trainer: Trainer) -> None:
    """Raise where the model cannot be measured before it trains.

    Raises:
        OptionError: With the setting.
    """
    if trainer.is_fsdp_enabled:
        raise OptionError(
            "eval_on_start: FSDP takes a model together with its optimizer, so there is nothing to measure before the "
            "training; leave eval_on_start out"
        )


@contextmanager
def placed(trainer: Trainer) -> Generator[None]:
    """Have the model on the device for the length of the block: with FSDP, only the training takes it there."""
    model: Any = trainer.model
    home = next(model.parameters()).device
    if trainer.is_fsdp_enabled:
        model.to(trainer.args.device)
    try:
        yield
    finally:
        if trainer.is_fsdp_enabled:
            model.to(home)


def _loads_on_first(trainer: Trainer) -> bool:
    plugin: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)
