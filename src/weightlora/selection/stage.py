"""A model while its sites are scored: plain LoRA on every site, batches and a loss; restored bit for bit afterwards."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from weightlora.errors import SelectionError, SiteError
from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.distributed import average_gradients, copy_from_first, make_whole
from weightlora.model.gathering import gathered, ready_for_adapters, require_loadable, require_loaded
from weightlora.model.layers import lora_layers, require_peft_wrapper, unchecked_patterns, without_adapters
from weightlora.model.restore import untouched
from weightlora.model.sites import Site, trained_modules
from weightlora.selection.batches import Loss, cycled, in_parts, kind_of, model_loss
from weightlora.selection.progress import Progress


@dataclass(frozen=True)
class OptimizerStep:
    """An optimizer with what a training does around each of its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    max_grad_norm: float = 0.0
    """Gradients of a larger norm are clipped to it; 0 clips none."""

    def step(self) -> None:
        """Clip, step, go on in the schedule, and clear the gradients."""
        if self.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()


#: Makes the optimizer of a training for a model whose trained parameters require gradients.
MakeStep = Callable[[nn.Module], OptimizerStep]


@dataclass(frozen=True)
class Stage:
    """A model with plain LoRA on every site, and what each scoring step needs."""

    model: nn.Module
    sites: Sequence[Site]
    """All candidates, sorted by name."""
    layers: Mapping[str, LoraLayer]
    """Those of the sites, by their names and in their order."""
    head: Sequence[nn.Parameter]
    """The parameters that PEFT trains whole: ``modules_to_save`` and the task's head."""
    batches: Iterator[Any]
    loss_fn: Loss
    progress: Progress
    learning_rate: float = 1e-3
    """AdamW's learning rate for whatever the scoring trains, constant."""
    head_learning_rate: float | None = None
    """That of the head, where it has its own."""
    run: OptimizerStep | None = None
    """The optimizer of the training that the scoring begins; None where it is no part of a training."""

    def parameters(self, matrix: Literal["lora_A", "lora_B"]) -> list[nn.Parameter]:
        """A or B of every site, in the order of the sites."""
        return [getattr(layer, matrix)["default"].weight for layer in self.layers.values()]

    def sites_in_model(self) -> list[Site]:
        """Return the sites in the order of their layers in ``model.modules()``."""
        places = {id(module): place for place, module in enumerate(self.model.modules())}
        return sorted(self.sites, key=lambda site: places[id(self.layers[site.name])])

    def take(self, count: int) -> Iterator[Any]:
        """Yield the next ``count`` batches, for rules that use a batch several times."""
        for batch in itertools.islice(self.batches, count):
            yield batch
            self.progress.update()

    def backward(self, what: str, step: int, watched: Sequence[Tensor], batch: Any = None) -> None:
        """Accumulate the gradients of a batch's loss, averaged over the processes.

        Args:
            what: Name of the phase, for errors and the progress bar.
            step: 1-based step, for errors.
            watched: The tensors whose gradients must be finite.
            batch: None takes the next one.

        Raises:
            SelectionError: The loss is no finite number, has no gradient, or a gradient is not finite.
        """
        where = f"{what} step {step}"
        shown = next(self.batches) if batch is None else batch
        for loss in in_parts(self.model, shown, self.loss_fn):
            _require_loss(loss, where)
            # A loss that switches adapters off for its reference, as DPO's does, turns requires_grad on again for all.
            _only(watched, self.model)
            loss.backward()
        average_gradients(watched)
        gradients = [tensor.grad for tensor in watched if tensor.grad is not None]
        if gradients and not bool(torch.isfinite(nn.utils.get_total_norm(gradients))):
            raise SelectionError(f"{where}: a gradient is not finite; lower learning_rate or look at that batch")
        self.progress.set_description(what)
        if batch is None:
            self.progress.update()

    def forward(self, what: str, step: int) -> None:
        """Run the model on the next batch without gradients, in the mode that it is in.

        Args:
            what: Name of the phase, for errors and the progress bar.
            step: 1-based step, for errors.

        Raises:
            SelectionError: The loss is no finite number.
        """
        with torch.no_grad():
            for loss in in_parts(self.model, next(self.batches), self.loss_fn):
                _require_number(loss, f"{what} step {step}")
        self.progress.set_description(what)
        self.progress.update()

    def optimizer(
        self, adapters: Sequence[nn.Parameter], learning_rate: float, scale: float = 1.0
    ) -> torch.optim.AdamW:
        """AdamW for these weights of adapters, and for the head at its own rate.

        Args:
            adapters: What is trained beside the head.
            learning_rate: The learning rate, also of a head without a rate of its own.
            scale: Factor of ``learning_rate`` for the adapters.
        """
        own = learning_rate if self.head_learning_rate is None else self.head_learning_rate
        return torch.optim.AdamW([{"params": adapters, "lr": learning_rate * scale}, {"params": self.head, "lr": own}])

    def optimizer_step(self, adapters: Sequence[nn.Parameter]) -> OptimizerStep:
        """That of the training, or AdamW at a constant rate for these weights of adapters and the head."""
        return self.run or OptimizerStep(self.model, self.optimizer(adapters, self.learning_rate))

    def train_head(self, steps: int) -> None:
        """Train the head alone: its random weights would otherwise decide the first gradients of the adapters."""
        if steps == 0:
            return
        with switched_off(self.layers.values()):
            let_train(self, self.head)
            optimizer = self.optimizer([], self.learning_rate)
            for step in range(1, steps + 1):
                self.backward("head", step, self.head)
                optimizer.step()
                optimizer.zero_grad()


@contextmanager
def with_plain_lora(model: nn.Module, lora: LoraConfig, sites: Sequence[Site], *, seed: int) -> Generator[nn.Module]:
    """Put plain LoRA on ``sites`` for the length of the block, in training mode; afterwards the model is as before.

    Yields:
        The PEFT model around ``model``'s base.

    Raises:
        OptionError: Accelerate loads weights with a module above.
        SiteError: A weight has no values, or autograd cannot use it.
    """
    require_loadable(model)
    require_loaded(model, computes=True)
    with untouched(model, seed=seed), torch.inference_mode(False), torch.enable_grad():
        attached = attach_plain_lora(model, lora, sites)
        remove_input_hooks(attached)  # as plan.attach will do; PEFT sets them anew under gradient checkpointing
        make_whole(attached)
        model.train()
        with gathered(model):
            yield attached


def head_of(attached: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a PEFT model that are no adapter's: modules that PEFT trains whole."""
    return [p for name, p in attached.named_parameters() if p.requires_grad and ".lora_" not in name]


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
    head_learning_rate: float | None = None,
) -> Generator[Stage]:
    """Yield a stage with plain LoRA on ``sites``; ``model`` is restored bit for bit when the block ends.

    Args:
        model: The base model.
        lora: The adapters wanted.
        sites: All candidates.
        batches: What the model is called with; used again, with a warning, where there are fewer than ``steps``.
        steps: Batches that the block will use.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.
        head_learning_rate: As in :func:`weightlora.select`.

    Example:
        >>> from weightlora.model.sites import find_sites
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> loss = lambda model, batch: model(batch["x"]).square().mean()
        >>> batches = [{"x": torch.ones(2, 4)}]
        >>> sites = find_sites(net).sites
        >>> with probed(net, LoraConfig(r=2), sites, batches=batches, steps=1, seed=0, loss_fn=loss) as stage:
        ...     train_adapters(stage, steps=1, learning_rate=0.1)
        ...     moved = bool(stage.parameters("lora_B")[0].any())
        >>> moved, type(net[0]).__name__
        (True, 'Linear')
    """
    with (
        with_plain_lora(model, lora, sites, seed=seed) as attached,
        tqdm(total=steps, disable=None, leave=False) as bar,
    ):
        head = head_of(attached)
        rows = cycled(batches, steps)
        yield Stage(
            model,
            sites,
            lora_layers(attached),
            head,
            rows,
            loss_fn or model_loss,
            Progress(bar, "scoring"),
            head_learning_rate=head_learning_rate,
        )


@contextmanager
def switched_off(layers: Collection[LoraLayer]) -> Generator[None]:
    """Switch adapters off for the length of the block: where B = 0 they add nothing but time."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def train_adapters(
    stage: Stage, *, steps: int, learning_rate: float, names: Sequence[str] | None = None, scale: float = 1.0
) -> None:
    """Train A, B and the new head for ``steps`` batches with AdamW at a constant rate.

    Args:
        stage: The model while its sites are scored.
        steps: Batches, one a step.
        learning_rate: AdamW's learning rate.
        names: The sites whose adapters are trained; None stands for all.
        scale: Factor of the learning rate for the adapters.
    """
    adapters = adapter_weights(stage, names)
    trained = [*adapters, *stage.head]
    let_train(stage, trained)
    optimizer = stage.optimizer(adapters, learning_rate, scale)
    for step in range(1, steps + 1):
        stage.backward("adapters", step, trained)
        optimizer.step()
        optimizer.zero_grad()


def adapter_weights(stage: Stage, names: Sequence[str] | None = None) -> list[nn.Parameter]:
    """A and B of the sites ``names``, or of all."""
    layers: list[Any] = [stage.layers[name] for name in (stage.layers if names is None else names)]
    return [matrix["default"].weight for layer in layers for matrix in (layer.lora_A, layer.lora_B)]


def attach_plain_lora(model: nn.Module, lora: LoraConfig, sites: Sequence[Site]) -> nn.Module:
    """Put plain LoRA on ``sites`` inside ``model``; adapters that it carries are taken off.

    Initialisations such as PiSSA write to the base weights, and variants such as DoRA slow every step down. Both are
    left out here and come back with the final config.

    Args:
        model: A base model, or a PEFT model.
        lora: The adapters wanted.
        sites: Where plain LoRA is put.

    Raises:
        OptionError: The model carries adapters, but is no PEFT model.
        SiteError: PEFT refuses to adapt a site, or adapts something else.
    """
    require_peft_wrapper(model)
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
    base = without_adapters(model)
    try:
        with unchecked_patterns(), ready_for_adapters(base, trained_modules(lora)):
            attached = get_peft_model(base, plain)  # pyright: ignore[reportArgumentType]  # any nn.Module
    except ValueError as error:
        text = " ".join(str(error).split())
        raise SiteError(f"PEFT cannot adapt these layers: {text}; leave them out with exclude_modules") from error
    names = [site.name for site in sites]
    different = sorted({*lora_layers(attached)} ^ {*names})
    if different:
        raise SiteError(
            f"PEFT would not adapt what was asked for: {different[0]} and {len(different) - 1} more differ; leave them "
            "out with exclude_modules, or name the layers in target_modules"
        )
    return attached


def let_train(stage: Stage, wanted: Sequence[nn.Parameter]) -> None:
    """Make exactly ``wanted`` require gradients, so that autograd does no other work."""
    for parameter in stage.model.parameters():
        parameter.grad = None
    _only(wanted, stage.model)
    copy_from_first(wanted)


def _only(wanted: Sequence[Tensor], model: nn.Module) -> None:
    chosen = set(map(id, wanted))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _require_loss(loss: object, where: str) -> None:
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.requires_grad:
        raise SelectionError(f"{where}: the loss has no gradient; does loss_fn detach it or run without gradients?")
    _require_number(loss, where)


def _require_number(loss: object, where: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise SelectionError(f"{where}: the loss is {kind_of(loss)}; loss_fn must return one number as a tensor")
    if not bool(torch.isfinite(loss)):
        raise SelectionError(f"{where}: the loss is {loss.item()}; lower learning_rate or look at that batch")
