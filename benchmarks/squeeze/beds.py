"""A bed of benchmarks/choice with LoRA on all sites, its batches in a fixed order, and a training that can be cut."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.files import read_mapping
from weightlora.model.layers import lora_layers
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import prepare

CHOICE = Path(__file__).parent.parent / "choice"
#: Learning rates of new heads, as docs/lab/choice.md has them; SmolLM2 has its own head, which stays.
HEADS = {"roget": 3.6e-2, "reviews": 1.5e-2}
WARMUP, CLIPPED = 0.06, 1.0


@dataclass
class Bed:
    """A model that is trained and cut again and again from the same start."""

    name: str
    seed: int
    model: Any
    measure: Any
    batches: Sequence[Mapping[str, Tensor]]
    layers: Mapping[str, Any]
    head: Sequence[nn.Parameter]
    start: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def restart(self, r: int, scale: float) -> None:
        """Set A to the first r rows of the start, B to zero, the head to its start."""
        for name, layer in self.layers.items():
            a = self.start[name][:r].clone()
            set_factors(layer, a, torch.zeros(layer.out_features, r), scale)
        for i, parameter in enumerate(self.head):
            parameter.data.copy_(self.start[f"head {i}"])

    def optimizer(self) -> torch.optim.AdamW:
        """A new optimizer: adapters first, the head second."""
        adapters = [w for layer in self.layers.values() for w in weights(layer)]
        return torch.optim.AdamW([{"params": adapters}, {"params": list(self.head)}], weight_decay=0.0)

    def train(self, optimizer: torch.optim.AdamW, rate: float, first: int, last: int) -> None:
        """Take the steps from ``first`` to ``last`` of the linear schedule with a warm-up."""
        steps = len(self.batches)
        warm, rates = WARMUP * steps, (rate, HEADS.get(self.name, rate))
        self.model.train()
        for step in range(first, last):
            torch.manual_seed(self.seed * 1_000_003 + step)  # the same dropout in every branch
            share = min((step + 1) / warm, (steps - step) / (steps - warm))
            for group, own in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = own * share
            optimizer.zero_grad()
            self.model(**self.batches[step]).loss.backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.numel()]
            nn.utils.clip_grad_norm_(parameters, CLIPPED)
            optimizer.step()


def load_bed(name: str, seed: int, *, r: int, alpha: int, rows: int, folder: str, **more: Any) -> Bed:
    """Return a bed with fresh adapters of rank r on all sites; ``more`` are options of its recipe."""
    base = read_mapping(CHOICE / f"beds.yaml#{name}")["base"]
    own = {"method": "lora", "lora_r": r, "lora_alpha": alpha, "fast": None, "dtype": "float32", "seed": seed}
    own |= {"max_train_samples": rows, "output_dir": folder, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    own |= {"max_eval_samples": 1000, "data_seed": seed}
    own |= {"head_learning_rate": HEADS[name]} if name in HEADS else {}
    run = prepare(read_recipe({**base, **own, **more}))
    model: Any = run.trainer.model
    torch.manual_seed(seed)
    batches = _batches(run.trainer.get_train_dataloader())
    layers: dict[str, Any] = dict(lora_layers(model))
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    start = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers.items()}
    start |= {f"head {i}": p.detach().clone() for i, p in enumerate(head)}
    return Bed(name, seed, model, lambda: run.task.measure(run.trainer), batches, layers, head, start)


def _batches(loader: Any) -> list[dict[str, Tensor]]:
    """The training's, in its order."""
    return [dict(batch.items()) for batch in loader]


def weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of a layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def set_factors(layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
    """Give a layer new parameters, of another rank where they have one; rank 0 adds nothing."""
    layer.lora_A["default"].weight = nn.Parameter(a.float())
    layer.lora_B["default"].weight = nn.Parameter(b.float())
    layer.scaling["default"] = scale


def snapshot(bed: Bed, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Return copies of all that the training has changed."""
    factors = {n: (*(w.detach().clone() for w in weights(x)), x.scaling["default"]) for n, x in bed.layers.items()}
    heads = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in bed.head]
    return {"factors": factors, "heads": heads}


def resume_cut(bed: Bed, saved: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> Any:
    """Put ``factors`` and the saved head on the model; return an optimizer that keeps the head's moments alone."""
    for name, layer in bed.layers.items():
        set_factors(layer, *factors[name])
    optimizer = bed.optimizer()
    for parameter, (value, state) in zip(bed.head, saved["heads"], strict=True):
        parameter.data.copy_(value)
        optimizer.state[parameter] = {k: v.clone() for k, v in state.items()}
    return optimizer


def quiet() -> tempfile.TemporaryDirectory[str]:
    """Silence the libraries, use one thread, and return a folder to work in."""
    import warnings

    from datasets import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    return tempfile.TemporaryDirectory()
