"""One line in an existing script: ``plan = weightlora.select_for(trainer)`` before ``trainer.train()``.

trainer → its own batches and loss → plan → the trainer's model with exactly the planned adapters
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import OptionError, SelectionError
from weightlora.fast.dropout import Dropout
from weightlora.fast.enable import enable_fast_lora, fast_dropout
from weightlora.files import writable_folder
from weightlora.methods.common.export import cast_trained, take_tuner
from weightlora.model.checkpointing import release_inputs, shorten_backward
from weightlora.model.distributed import from_first
from weightlora.model.layers import lora_layers
from weightlora.model.restore import seeded
from weightlora.model.sites import require_uncompiled
from weightlora.plan.budget import Keep, warmup_steps
from weightlora.plan.plan import AdapterPlan, config_fields
from weightlora.selection.select import HEAD_STEPS, select
from weightlora.selection.warmup import WarmupOptions
from weightlora.trainer.loader import losses, optimizer_steps, planned_steps, quiet_copy
from weightlora.trainer.placement import placed, require_heads, require_weights

PLAN_FILE = "plan.json"


def select_for(
    trainer: Trainer,
    *,
    lora: LoraConfig | None = None,
    keep: Keep = 0.5,
    expand: bool = False,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    fast: Dropout | None = None,
    **options: Any,
) -> AdapterPlan:
    """Return the plan for what ``trainer`` is about to train; its model then carries exactly the planned adapters.

    The warm-up uses the trainer's own data loader, collator, loss, precision and gradient accumulation; afterwards
    the adapters start afresh. The plan is written to ``output_dir/plan.json`` at once and into every checkpoint. When
    one is already there it is used instead of a new warm-up, so that a restarted or resumed run has the same
    structure: the paper's phase 1 runs once.

    Works with transformers' ``Trainer`` and ``Seq2SeqTrainer`` and TRL's ``SFTTrainer`` and ``DPOTrainer``, in one
    process or several.

    Args:
        trainer: A trainer that has not trained yet. Its model is a PEFT model with fresh LoRA adapters, and stays the
            same object; or it has no adapters and ``lora`` is given.
        lora: The adapters wanted, where the trainer's model has none.
        keep: As in :func:`weightlora.select`.
        expand: WeightLoRA+: give the survivors the freed rank; see :meth:`AdapterPlan.expand`.
        steps: T; None stands for 0.5 % of the training's steps, at least 20.
        lr: The warm-up's learning rate; None takes the trainer's.
        seed: As in :func:`weightlora.select`; None takes the trainer's.
        fast: Warm-up and training take the step of :func:`weightlora.enable_fast_lora`, with this ``dropout``; None
            leaves it to the model, on which it may be enabled already.
        options: Further arguments of :func:`weightlora.select`: rule, head_steps, threshold_every, ...

    Raises:
        OptionError: The trainer has trained, is wrapped or has an optimizer; its adapters are trained; there is no
            LoRA to plan; or a plan in ``output_dir`` was made with other options.
        SelectionError: See :func:`weightlora.select`. The trainer then refuses to train: it would train plain LoRA.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 160
        >>> quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        >>> trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=1, **quiet), train_dataset=rows)
        >>> plan = select_for(trainer)
        >>> len(plan.names), trainer.model is model
        (1, True)
    """
    lora = lora_of(trainer, lora)
    require_fresh(trainer)
    fast = fast_dropout(trainer.model) if fast is None else fast  # pyright: ignore[reportArgumentType]
    guard = PlanGuard()
    trainer.add_callback(guard)
    arguments = trainer.args
    seed = arguments.seed if seed is None else seed
    options = {"keep": keep, "lr": arguments.learning_rate if lr is None else lr, "fast": fast, **options}
    path = Path(str(arguments.output_dir)) / PLAN_FILE

    wanted = {**options, "steps": steps, "seed": seed, "expand": expand}
    plan = from_first(partial(_stored_plan, path, lora, wanted))
    if plan is None:
        from_first(partial(writable_folder, path.parent))
        options["steps"] = warmup_steps(planned_steps(trainer)) if steps is None else steps
        plan = _select(trainer, lora, seed=seed, progress=not arguments.disable_tqdm, **options)
        plan = plan.expand() if expand else plan
        from_first(partial(plan.save, path))
    _adapt(trainer, plan, seed, fast)
    require_heads(trainer)
    guard.plan = plan
    return plan


def adopt(trainer: Trainer, plan: AdapterPlan, *, seed: int, fast: Dropout | None = None) -> AdapterPlan:
    """Give the trainer's PEFT model exactly the adapters of a plan that was found elsewhere, freshly initialised.

    Like :func:`select_for`, with the warm-up done before.

    Args:
        trainer: A trainer that has not trained yet, on a PEFT model with fresh LoRA adapters.
        plan: Made for the trainer's base model.
        seed: Decides A's random start.
        fast: As in :func:`select_for`.

    Raises:
        OptionError: The trainer is not fresh, or ``output_dir`` holds another plan.
        PlanMismatchError: The plan was made for another model.
    """
    lora_of(trainer, None)
    require_fresh(trainer)
    plan.check_sites(trainer.model)  # pyright: ignore[reportArgumentType]
    guard = PlanGuard()
    trainer.add_callback(guard)
    from_first(partial(keep_plan, plan, Path(str(trainer.args.output_dir)) / PLAN_FILE))
    _adapt(trainer, plan, seed, fast)
    require_heads(trainer)
    guard.plan = plan
    return plan


class PlanGuard(TrainerCallback):
    """Keeps plan and training together: no training without the plan, no checkpoint without it."""

    def __init__(self) -> None:
        self.plan: AdapterPlan | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to train where the selection did not happen or the model has other adapters by now."""
        if self.plan is None:
            raise SelectionError("select_for() failed, so this trainer would train plain LoRA; make a new one")
        self.plan.check(kwargs["model"])
        shorten_backward(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the backward pass short: DPO switches checkpointing off and on again after each forward pass."""
        release_inputs(kwargs["model"])

    on_substep_end = on_step_begin

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the plan into the checkpoint that was just written."""
        if state.is_world_process_zero and self.plan is not None:
            self.plan.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / PLAN_FILE)


def lora_of(trainer: Trainer, lora: LoraConfig | None) -> LoraConfig:
    """The adapters wanted: those that the model has, freshly made, or ``lora``.

    Raises:
        OptionError: There are none, both, or the model's are trained.
    """
    model: Any = trainer.model
    require_uncompiled(model)
    if not isinstance(model, PeftModel):
        if lora is None:
            raise OptionError(
                "the trainer's model has no LoRA adapters to choose from; wrap it with get_peft_model(model, "
                "LoraConfig(...)) first (peft_config=... in TRL), or give lora="
            )
        return deepcopy(lora)
    if lora is not None:
        raise OptionError("the trainer's model has LoRA adapters already; leave lora= out, or give the base model")
    config = model.peft_config.get("default")
    if not isinstance(config, LoraConfig):
        raise OptionError(f"the trainer's model has adapters {', '.join(model.peft_config)}, no LoRA named 'default'")
    for adapter in model.peft_config:
        trained = [n for n, layer in lora_layers(model, adapter).items() if _weight(layer.lora_B[adapter]).any()]
        if trained:
            raise OptionError(
                f"B of {trained[0]} (adapter {adapter!r}) is not zero: it was trained, or its initialisation "
                f"({config.init_lora_weights!r}) rewrote the base; merge it, or build the trainer on the base model "
                "and call select_for(trainer, lora=...)"
            )
    return deepcopy(config)


def require_fresh(trainer: Trainer) -> None:
    """Raise where the trainer has a plan, an optimizer or steps behind it.

    Raises:
        OptionError: With what it has.
    """
    if any(isinstance(callback, PlanGuard) for callback in trainer.callback_handler.callbacks):
        raise OptionError("select_for() has run on this trainer already; make a new trainer for a new plan")
    if trainer.state.global_step > 0:
        raise OptionError(f"the trainer has trained {trainer.state.global_step} steps; make a new one and select first")
    if trainer.optimizer is not None:
        raise OptionError(
            "the trainer has an optimizer, which holds adapters that the plan may drop; pass no optimizers= and let "
            "the trainer make it, or plan with select() before the optimizer is made"
        )
    if trainer.model_wrapped is not trainer.model:
        raise OptionError("the trainer's model is wrapped already; call select_for() before anything prepares it")


def _stored_plan(path: Path, lora: LoraConfig, wanted: dict[str, Any]) -> AdapterPlan | None:
    """The plan of an earlier start of the same run; an error where it answers another question."""
    if not path.exists():
        return None
    plan = AdapterPlan.load(path)
    defaults = {k: v for k, v in asdict(WarmupOptions()).items() if k != "head_steps"}
    asked = {key: value for key, value in {**defaults, **wanted}.items() if value is not None}
    made = {**plan.options, "rule": plan.rule, "seed": plan.seed, "expand": "expand" in plan.options}
    faults = [f"{key}={made.get(key)!r} there, {value!r} now" for key, value in asked.items() if made.get(key) != value]
    if dict(plan.lora) != config_fields(lora):
        faults.append("another LoraConfig")
    if faults:
        raise OptionError(
            f"{path} was made with other options ({'; '.join(faults)}); choose another output_dir, or delete that file"
        )
    return plan


def keep_plan(plan: AdapterPlan, path: Path) -> None:
    """Write the plan, unless another one is there.

    Raises:
        OptionError: There is another.
    """
    if path.exists() and AdapterPlan.load(path).ranks != plan.ranks:
        raise OptionError(f"{path} is another plan; choose another output_dir, or delete that file")
    plan.save(path)


def _select(trainer: Trainer, lora: LoraConfig, **options: Any) -> AdapterPlan:
    """Run the warm-up on the trainer's model, batches and loss."""
    require_weights(trainer)
    model: Any = trainer.model
    if trainer.args.activation_checkpointing:  # as trainer.train() will do
        given: Any = trainer.args.activation_checkpointing_kwargs
        settings: dict[str, Any] = dict(given or {})
        placing = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
        model.activation_checkpointing_enable(settings or None, **placing)
    release_inputs(model)  # as PlanGuard will do
    quiet = quiet_copy(trainer)
    count = options["steps"] + (HEAD_STEPS if options.get("head_steps") is None else options["head_steps"])
    with seeded(options["seed"]):  # before anything is drawn: the loader's order must not depend on the adapters
        steps = list(islice(optimizer_steps(quiet), count))
    with placed(trainer):
        return select(model, steps, lora=lora, loss_fn=losses(quiet), **options)


def _adapt(trainer: Trainer, plan: AdapterPlan, seed: int, fast: Dropout | None) -> None:
    """Put freshly initialised adapters on the planned sites; a PEFT model stays the same object, with a new tuner."""
    old: Any = trainer.model
    plan.check_sites(old)
    with seeded(seed):
        if isinstance(old, PeftModel):
            _replace_tuner(old, plan)
        else:
            new = plan.attach(old)
            trainer.model = trainer.model_wrapped = trainer.callback_handler.model = new  # pyright: ignore
    if fast is not None:
        enable_fast_lora(trainer.model, fast)  # pyright: ignore[reportArgumentType]


def _replace_tuner(old: Any, plan: AdapterPlan) -> None:
    (dtype, *others) = {p.dtype for p in old.parameters() if p.requires_grad}
    new = plan.attach(old.base_model.unload())
    if not others:  # TRL's choice for quantised models, or the user's
        cast_trained(new, dtype)
    take_tuner(old, new)
    plan.check(old)


def _weight(matrix: Any) -> Tensor:
    return matrix.weight.detach()
