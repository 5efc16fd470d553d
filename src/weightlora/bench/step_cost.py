"""What a step of a run costs, measured in the run itself: time against plain LoRA, saved bytes, peak parameters."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.cost.saved_bytes import now
from weightlora.cost.step_time import interleaved, median_ratio
from weightlora.files import write_json


class Peak:
    """Counts what optimizers hold while :meth:`watched`."""

    def __init__(self) -> None:
        self.parameters = 0
        """Most trained numbers of any optimizer that took a step, a head's included."""

    @contextmanager
    def watched(self) -> Generator[None]:
        """Look at every optimizer step of the block, those of a selection too."""
        handle = register_optimizer_step_post_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        held = {id(p): p.numel() for group in optimizer.param_groups for p in group["params"]}
        self.parameters = max(self.parameters, sum(held.values()))


class StepCost(TrainerCallback):
    """Writes ``{step_ratio, saved_bytes, peak_parameters, measuring_seconds}`` to a file when the training ends.

    The ratio compares a step of the trained model with one of plain LoRA on all candidates in stock PEFT. The steps
    are interleaved in this process; what a method's callback does between steps is not counted.

    Args:
        path: The file.
        rounds: Steps timed; 0 writes the peak alone.
        peak: Looks at the run from outside.
    """

    def __init__(self, path: Path, rounds: int, peak: Peak) -> None:
        self._path, self._rounds, self._peak = path, rounds, peak
        self._plain: Any = None
        self._head = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Keep plain LoRA and count its head, before the method changes the model."""
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        self._head = sum(count for name, count in trained.items() if "modules_to_save" in name)
        if self._rounds:
            lora = copy.deepcopy(model.peft_config["default"])
            lora.use_dora = False
            with torch.random.fork_rng():
                self._plain = get_peft_model(copy.deepcopy(model).unload(), lora)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure; weights and random numbers stay what they are."""
        start = now()
        cost: dict[str, Any] = {"peak_parameters": self._peak.parameters - self._head}
        if self._rounds:
            with torch.random.fork_rng():
                batch = next(iter(train_dataloader))
                self._plain.to(next(model.parameters()).device)
                cost["saved_bytes"] = saved_bytes(model.train(), batch)
                ratios = step_ratios({"plain": self._plain, "own": model}, batch, rounds=self._rounds)
                cost["step_ratio"] = round(ratios["own"], 4)
            self._plain = None
        cost["measuring_seconds"] = now() - start  # the trainer's own clock runs on meanwhile
        write_json(self._path, cost)


def step_ratios(models: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor], *, rounds: int) -> dict[str, float]:
    """Return each model's step time ÷ the first model's: medians of interleaved steps in this process.

    AdamW really steps, at a learning rate of 0: the weights stay what they are.
    """

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = [[p for p in model.parameters() if p.requires_grad] for model in models.values()]
    optimizers = [torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) for parameters in trained]
    seconds = interleaved([partial(step, *pair) for pair in zip(models.values(), optimizers, strict=True)], rounds)
    return {name: median_ratio(times, seconds[0]) for name, times in zip(models, seconds, strict=True)}


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """Return the bytes that autograd holds for the backward pass: each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # a kept output would keep its graph alive, and the graph the output
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
