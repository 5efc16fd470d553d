"""A model lent out with plain LoRA on every site, and rows held out, for methods that look before they choose."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from tqdm import tqdm

from weightlora.model.distributed import make_whole
from weightlora.model.layers import lora_layers
from weightlora.model.restore import untouched
from weightlora.model.sites import Site
from weightlora.selection.warmup import Loss, Stage, cycled, let_train, model_loss, peeked


@contextmanager
def probed(
    model: nn.Module,
    lora: LoraConfig,
    sites: Sequence[Site],
    *,
    batches: Iterable[Any],
    steps: int,
    seed: int,
    loss_fn: Loss | None = None,
) -> Generator[Stage]:
    """Lend ``model`` out with plain LoRA on ``sites``, in training mode; it comes back bit for bit as it was.

    Args:
        model: The base model.
        lora: The adapters wanted.
        sites: All candidates.
        batches: What the model is called with; used again, with a warning, where there are fewer than ``steps``.
        steps: Batches that the block will take.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.

    Example:
        >>> from weightlora.model.sites import find_sites
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> batches = [{"x": torch.ones(2, 4)}]
        >>> sites = find_sites(net).sites
        >>> with probed(net, LoraConfig(r=2), sites, batches=batches, steps=1, seed=0, loss_fn=loss) as stage:
        ...     train_adapters(stage, steps=1, lr=0.1)
        ...     moved = bool(stage.parameters("lora_B")[0].any())
        >>> moved, type(net[0]).__name__
        (True, 'Linear')
    """
    with untouched(model, seed=seed), torch.inference_mode(False), torch.enable_grad():
        attached = attach_plain_lora(model, lora, sites)
        make_whole(attached)
        layers = lora_layers(attached)
        head = [p for n, p in attached.named_parameters() if p.requires_grad and ".lora_" not in n]
        model.train()
        with tqdm(total=steps, disable=None, leave=False) as bar:
            yield Stage(model, layers, head, cycled(batches, steps), loss_fn or model_loss, bar)


def held_out(batches: Iterable[Any], rows: int) -> list[Any]:
    """Return the first batches, as many as have ``rows`` together, or all.

    Raises:
        SelectionError: There is none.
    """
    taken: list[Any] = []
    _, shown = peeked(batches)
    for batch in shown:
        taken.append(batch)
        if sum(map(rows_of, taken)) >= rows:
            break
    return taken


def rows_of(batch: Any) -> int:
    """Return the length of a batch's first tensor; 1 where there is none.

    Example:
        >>> rows_of({"input_ids": torch.zeros(4, 7)}), rows_of((torch.zeros(3, 2), "x")), rows_of("x")
        (4, 3, 1)
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 1)


@contextmanager
def evaluated(model: nn.Module) -> Generator[None]:
    """Let ``model`` be without dropout for the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def train_adapters(stage: Stage, *, steps: int, lr: float, names: Sequence[str] | None = None) -> None:
    """Train A, B and the fresh head for ``steps`` batches with AdamW at a constant rate, as the training will.

    Args:
        stage: The lent model.
        steps: Batches, one a step.
        lr: AdamW's learning rate.
        names: The sites whose adapters are trained; None stands for all.
    """
    trained = [*adapter_weights(stage, names), *stage.head]
    let_train(stage, trained)
    optimizer = torch.optim.AdamW(trained, lr=lr)
    for step in range(1, steps + 1):
        stage.backward("adapters", step, trained)
        optimizer.step()
        optimizer.zero_grad()


def adapter_weights(stage: Stage, names: Sequence[str] | None = None) -> list[nn.Parameter]:
    """A and B of the sites ``names``, or of all."""
    layers: list[Any] = [stage.layers[name] for name in (stage.layers if names is None else names)]
    return [matrix["default"].weight for layer in layers for matrix in (layer.lora_A, layer.lora_B)]


def attach_plain_lora(model: nn.Module, lora: LoraConfig, sites: Sequence[Site]) -> nn.Module:
    """Put plain LoRA on ``sites`` inside ``model``, in the place of the adapters that it may carry.

    Initialisations such as PiSSA write to the base weights, and variants such as DoRA make every step dearer; both
    are for the training and come back with the final config.

    Args:
        model: A base model, or a PEFT model whose adapters give way.
        lora: The adapters wanted.
        sites: Where plain LoRA is put.
    """
    base = model
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        base = tuner.unload() if isinstance(tuner, BaseTuner) else model.get_base_model()
    plain = LoraConfig(
        task_type=lora.task_type,
        # A pattern and no list: PEFT takes a listed name for the ending of others as well.
        target_modules="|".join(re.escape(site.name) for site in sites),
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        use_rslora=lora.use_rslora,
        lora_dropout=lora.lora_dropout,
        fan_in_fan_out=lora.fan_in_fan_out,
        modules_to_save=deepcopy(lora.modules_to_save),
    )
    return get_peft_model(base, plain)  # pyright: ignore[reportArgumentType]  # PEFT takes any nn.Module
