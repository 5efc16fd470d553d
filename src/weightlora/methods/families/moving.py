"""Methods that act while they train: their base, and the callback that calls them and saves their state.

A mover's averages and masks are written to ``checkpoint-N/method_state.safetensors``, never into the adapter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import DataError, OptionError, SelectionError, WeightLoraWarning
from weightlora.files import whole_file
from weightlora.methods.base import MethodBase, Start, uniform_plan
from weightlora.methods.families.export import Factors, become_stock, factors_plan, layer_factors
from weightlora.model.distributed import from_first, require_equal
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites, rank_and_alpha
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch.utils.hooks import RemovableHandle

STATE_FILE = "method_state.safetensors"


Attached: TypeAlias = "tuple[AdapterPlan, PeftModel]"


class MovingMethod(MethodBase):
    """A :class:`Method` that changes ranks or gradients around each optimizer step; its callback calls it.

    A method is a dataclass of its options that derives from this. It starts with :meth:`_start` and acts in
    :meth:`before_step` and :meth:`after_step`. :meth:`_in_force` says which components count as ranks.
    """

    name: ClassVar[str]
    _layers: Mapping[str, Any]
    """The sites' adapters, by name."""
    _total: int
    """Optimizer steps that the training takes."""
    _low: int
    """Plain LoRA's ranks, summed over the sites."""

    def _start(self, start: Start) -> Attached:
        """Put the first adapters on all sites, and return their plan and the model."""
        raise NotImplementedError

    def _ready(self) -> None:
        """Set what depends on the attached layers."""

    def _in_force(self) -> Mapping[str, Tensor] | None:
        """Return a mask of each site's components, true where one is a rank; None: all are."""

    def _factors(self, layer: Any, mask: Tensor | None) -> Factors:
        """Return a layer's update at the end, of the components in ``mask``."""
        whole = layer_factors(layer)
        kept = slice(None) if mask is None else mask.to(whole.a.device)
        return Factors(whole.a[kept], whole.b[:, kept], whole.scale)

    def _missing(self, ranks: int) -> str | None:
        """Return what the training has not brought yet; ``ranks`` are about to be exported."""
        return f"has {ranks} ranks left, {self._low} are the budget" if ranks > self._low else None

    def before_step(self, step: int) -> None:
        """Act before optimizer step ``step`` (1-based), when gradients are clipped."""

    def after_step(self, step: int) -> None:
        """Act after optimizer step ``step`` (1-based), before gradients are cleared."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed training needs besides the weights."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set what :meth:`state` returned."""

    @property
    def plan(self) -> AdapterPlan:
        """The ranks attached before the training, as in its checkpoints; then the current ones."""
        plan, masks = self._plan, self._in_force() if self._begun else None
        if masks is None:
            return plan
        return replace(plan, entries=tuple(replace(e, r=int(masks[e.site.name].sum())) for e in plan.entries))

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:
        """Put the first adapters on all sites."""
        sites = find_sites(model, lora).sites
        self._total, self._low = total_steps, sum(rank_and_alpha(lora, site.name)[0] for site in sites)
        self._plan, attached = self._start(Start(model, lora, sites, batches))
        self._layers = lora_layers(attached)
        self._begun = False
        self._handles: list[RemovableHandle] = []
        self._ready()
        tuner: Any = attached.base_model
        self._remove_watch = _warn_unless_begun([tuner, tuner.model], self.name)
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that calls the method around each optimizer step."""
        return [MoverCallback(self)]

    def before_training(self, total_steps: int) -> None:
        """Act before the first step of a training of ``total_steps``.

        Raises:
            OptionError: :meth:`attach` was told another number.
        """
        if self._total != total_steps:
            raise OptionError(
                f"{self.name} was attached for {self._total} steps and the training takes {total_steps}; attach it "
                "with the number of optimizer steps"
            )
        self._begun = True
        self._remove_watch()

    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the components in force.

        Raises:
            SelectionError: The method did not run to its end.
        """
        masks = self._in_force() or {}
        factors = {name: self._factors(layer, masks.get(name)) for name, layer in lora_layers(model).items()}
        missing = self._missing(sum(factor.rank for factor in factors.values()))
        if missing is not None:
            raise SelectionError(
                f"{self.name} {missing}: it did not run to the end; give the trainer callbacks=method.callbacks(), and "
                "train all of the steps"
            )
        self._plan, self._begun = factors_plan(self._plan, factors), False
        self._remove_watch()
        return become_stock(model, self._plan, factors)

    def _mask_gradients(self, parameters: Iterable[Tensor], masked: Callable[[int, Tensor], Tensor]) -> None:
        """From now on replace the gradient of the i-th parameter by ``masked(i, gradient)``."""
        for handle in self._handles:
            handle.remove()
        self._handles = [each.register_hook(partial(masked, i)) for i, each in enumerate(parameters)]


class MoverCallback(TrainerCallback):
    """Makes a trainer call a mover in each optimizer step, also under accumulation, and saves the mover's state."""

    def __init__(self, mover: MovingMethod) -> None:
        self.mover = mover

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or resume from the checkpoint that the trainer has loaded.

        Raises:
            OptionError: The weights of another step would be loaded at the end.
            DataError: The checkpoint has no state of the method, or a damaged one.
        """
        if args.load_best_model_at_end:
            raise OptionError(
                "load_best_model_at_end would end with the ranks of an earlier step, over the budget; leave it out"
            )
        self.mover.before_training(state.max_steps)
        if state.global_step > 0:
            _restore(self.mover, _state_path(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare what the processes have trained.

        Raises:
            SelectionError: They have trained different adapters.
        """
        require_equal([p for p in kwargs["model"].parameters() if p.requires_grad], "what was trained")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the mover before the step."""
        self.mover.before_step(state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the mover after the step; the trainer has not counted it yet."""
        self.mover.after_step(state.global_step + 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the mover's state in the checkpoint."""
        if state.is_world_process_zero:
            tensors = {name: tensor.contiguous() for name, tensor in self.mover.state().items()}
            with whole_file(_state_path(args, state)) as draft:
                save_file(tensors, draft)


def take_up(callbacks: Sequence[TrainerCallback], checkpoint: Path, total_steps: int) -> None:
    """Restore movers from ``checkpoint``, the last of a training of ``total_steps``, without a trainer.

    Raises:
        DataError: The checkpoint has no state of the method, or a damaged one.
    """
    for callback in callbacks:
        if isinstance(callback, MoverCallback):
            callback.mover.before_training(total_steps)
            _restore(callback.mover, checkpoint / STATE_FILE)


def _warn_unless_begun(modules: Sequence[nn.Module], what: str) -> Callable[[], None]:
    """Warn once if one of ``modules`` is trained before the returned function was called.

    Args:
        modules: The tuner and the model in it; the model's task decides which of them is called.
        what: Name of the method.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> begin = _warn_unless_begun([layer], "a method")
        >>> begin()
        >>> layer(torch.ones(1, 1)).shape
        torch.Size([1, 1])
    """

    def check(module: nn.Module, _inputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            remove()
            warnings.warn(
                f"{what} is being trained, but its callback is missing: give the trainer callbacks=method.callbacks(), "
                "or call before_training(), before_step() and after_step() of the callback's mover in your loop",
                WeightLoraWarning,
                stacklevel=2,
            )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    handles = [module.register_forward_pre_hook(check) for module in modules]
    return remove


def _restore(mover: MovingMethod, path: Path) -> None:
    state = from_first(partial(_read, path))  # other nodes may have no such file
    try:
        mover.restore(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or of another run: {type(error).__name__}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path} is missing: training cannot resume without the method's averages and masks")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:  # cut off
        raise DataError(f"{path} is damaged or of another run: {type(error).__name__}: {error}") from error


def _state_path(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE


def wide_lora(name: str, start: Start, r: int, options: Mapping[str, Any]) -> Attached:
    """Put LoRA of rank ``r`` on all sites, each rank with plain LoRA's scale; return its plan and the model."""
    alpha = start.lora.lora_alpha * r / start.lora.r
    plan = uniform_plan(start, r=r, alpha=alpha, rule=name, options=options)
    return plan, plan.attach(start.model)


def packed(**kinds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of several kinds, each by name, as one state.

    Example:
        >>> packed(mask={"layer": torch.ones(1)})
        {'mask layer': tensor([1.])}
    """
    return {f"{kind} {name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}


def unpacked(state: Mapping[str, Tensor], *kinds: str) -> list[dict[str, Tensor]]:
    """Return what :func:`packed` was given, in the order of ``kinds``.

    Raises:
        KeyError: There is another kind.
    """
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for key, tensor in state.items():
        kind, _, name = key.partition(" ")
        found[kind][name] = tensor
    return list(found.values())


def window(begin: float, end: float, total_steps: int) -> tuple[int, int]:
    """Return the first and the last step in which ranks change, from shares of the training.

    Raises:
        OptionError: There is no step between them.

    Example:
        >>> window(0.15, 0.5, 20)
        (3, 10)
    """
    first = math.ceil(round(begin * total_steps, 6))
    length = math.floor(round((end - begin) * total_steps, 6))
    if length < 1:
        raise OptionError(
            f"{total_steps} steps leave none between begin={begin} and end={end}; train longer or move them apart"
        )
    return first, first + length


def require_window(begin: float, end: float) -> None:
    """Raise unless ``begin`` and ``end`` are increasing shares of a training.

    Raises:
        OptionError: They are not.
    """
    if not 0 <= begin < end <= 1:
        raise OptionError(f"begin={begin} and end={end} are not allowed: give shares with 0 <= begin < end <= 1")


def growth(scores: Sequence[float], ranks: Sequence[int], *, total: int, count: int, max_r: int) -> list[int]:
    """Return how many ranks each site gains: ``count`` by falling score, repeated until ``total`` is spent.

    Example:
        >>> growth([1.0, 3.0, 2.0], [1, 3, 1], total=4, count=2, max_r=4)
        [1, 1, 2]
    """
    gains, left = [0] * len(ranks), total
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert total <= sum(max_r - rank for rank in ranks), "max_r allows the total"
    while left:
        for i in order:
            gain = min(count, left, max_r - ranks[i] - gains[i])
            gains[i] += gain
            left -= gain
    return gains
