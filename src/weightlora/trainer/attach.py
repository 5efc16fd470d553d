"""Any method on a transformers or TRL trainer, in one line before ``trainer.train()``.

plan = weightlora.select_for(trainer, time=0.6)                # or parameters=0.1, memory="8GB", adapters=18
method = weightlora.method_for(trainer, "adalora", init_r=12)  # any other method
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from transformers import Trainer

from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.fast.enable import enable_fast_lora, fast_dropout
from weightlora.fast.step import Dropout
from weightlora.files import writable_folder
from weightlora.methods import Method, MethodEntry, entry_of, make_method, options_of
from weightlora.methods.base import planned_method, with_question
from weightlora.methods.families.export import cast_trained
from weightlora.methods.families.selecting import SelectingMethod
from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.distributed import from_first, is_first, process_count
from weightlora.model.gathering import is_offloaded, partitioned_dtype
from weightlora.model.layers import take_tuner, without_adapters
from weightlora.model.restore import seeded
from weightlora.plan.limits import LIMITS, UNIFORM
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.batches import peeked
from weightlora.trainer._question import question_of
from weightlora.trainer._stored import START_FILE, keep_plan, read_start, stored_plan, write_start
from weightlora.trainer.batch_size import split_batch
from weightlora.trainer.guard import (
    PLAN_FILE,
    PlanGuard,
    PlanSaver,
    guarded,
    lora_of,
    require_fresh,
    require_whole,
    run_step,
    write_checkpoint,
)
from weightlora.trainer.loader import (
    is_parted,
    losses,
    micro_batches,
    micro_loss,
    optimizer_steps,
    placed,
    planned_epochs,
    planned_steps,
    quiet_copy,
    require_heads,
    require_readable_twice,
    require_usable_batches,
    require_weights,
    within_memory,
)
from weightlora.trainer.store import store_planned

_LOG = logging.getLogger(__name__)


def method_for(
    trainer: Trainer,
    name: str = "selected",
    *,
    lora: LoraConfig | None = None,
    seed: int | None = None,
    fast: Dropout | None = None,
    **options: Any,
) -> Method:
    """Return the method that ``trainer`` is about to train with; its model carries that method's adapters.

    Methods that choose sites use the trainer's own data loader, collator, loss, precision and gradient accumulation.
    The plan is written to ``output_dir/plan.json`` at once and into every checkpoint. Where WeightLoRA finds a plan
    there, it uses that plan instead of scoring again, so that a resumed run has the same structure. All that the plan
    was made for must be the same: LoRA configuration, candidates, base weights, options, seed, and the first batch of
    the training. Where a checkpoint or an adapter is there, anything else is an error that names what differs; a plan
    that nothing was trained with is replaced, with a warning in the log. With ``warm_start=True`` it also writes the
    weights that the training starts from, and a second start reads them there; a checkpoint that the trainer then
    resumes from replaces them.

    ``"weightlora"`` and ``"weightlora_plus"``, the paper's, take the first T steps of the training here, and write
    ``output_dir/checkpoint-T``. ``trainer.train(resume_from_checkpoint=True)`` goes on at step T + 1.

    Works with transformers' ``Trainer`` and ``Seq2SeqTrainer`` and TRL's ``SFTTrainer`` and ``DPOTrainer``. Methods
    that change ranks while they train also work under DDP, and those that train plain LoRA under FSDP2 as well. When
    the training is over, ``method.export(trainer.model)`` turns the model into stock LoRA; for methods that train plain
    LoRA it already is.

    Args:
        trainer: A trainer that has not trained yet. Its model is a PEFT model with fresh LoRA adapters, and stays the
            same object; or it has no adapters and ``lora`` is given.
        name: One of :data:`weightlora.methods.METHODS`.
        lora: The adapters wanted, where the trainer's model has none: plain LoRA on all candidates, the budget.
        seed: Decides all random numbers; None takes the trainer's.
        fast: Scoring and training use the step of :func:`weightlora.enable_fast_lora`, with this ``dropout``; None
            leaves it to the model, on which it may be enabled already.
        options: The method's own, such as ``parameters`` and ``rule``.

    Raises:
        OptionError: There is no such method or option, the trainer has trained, is wrapped, has an optimizer or a
            ``model_init``, its adapters are trained or more than one, there is no LoRA, ``output_dir`` holds a training
            with a plan made for something else, the rows can be read only once, or the trainer generates what it trains
            on, as GRPO's does: then plan with :func:`weightlora.select`.
        SelectionError: See :func:`weightlora.select`, or the batch did not fit into memory. The trainer refuses to
            train until a later call succeeds: it would train plain LoRA.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
        >>> quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        >>> trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=1, **quiet), train_dataset=rows)
        >>> method = method_for(trainer, "random", adapters=1)
        >>> len(method.plan.names), trainer.model is model
        (1, True)
    """
    entry = entry_of(name)
    reads = _reads_batches(entry, options)
    if reads:
        require_usable_batches(trainer)
        require_readable_twice(trainer)
    lora = lora_of(trainer, lora)
    guard = guarded(trainer)
    fast = fast_dropout(trainer.model) if fast is None else fast  # pyright: ignore[reportArgumentType]
    seed = trainer.args.seed if seed is None else seed
    defaults = _defaults(trainer, entry, seed, fast)
    given = {**{k: v for k, v in defaults.items() if k in options_of(name)}, **options}
    method = make_method(name, **given)
    _require_possible(trainer, entry, fast)
    start = _plan_path(trainer).with_name(START_FILE) if given.get("warm_start") else None
    step, batches = _batches(trainer, entry, seed) if reads else (None, ())
    if entry.reuses_plan:
        first, own_loss = None if step is None else step[0][0], "loss_fn" in options
        selecting = cast("SelectingMethod", method)
        question = question_of(trainer, name, lora, selecting, first=first, own_loss=own_loss)
        stored = from_first(partial(stored_plan, _plan_path(trainer), question))
        if stored is not None:
            same = planned_method(stored, None if start is None else partial(read_start, start))
            guard.begun = stored.options["steps"] if entry.begins_training else 0
            return _attach(trainer, same, guard, lora, (), seed=seed, fast=fast)
        method = with_question(selecting, question)
    from_first(partial(writable_folder, _plan_path(trainer).parent))
    whole = entry.trains == "lora"
    return _attach(trainer, method, guard, lora, batches, seed=seed, fast=fast, whole=whole, start=start)


def select_for(
    trainer: Trainer,
    *,
    adapters: float | None = None,
    parameters: float | None = None,
    time: float | None = None,
    memory: str | None = None,
    lora: LoraConfig | None = None,
    store: bool | Mapping[str, Any] = False,
    **options: Any,
) -> AdapterPlan:
    """Return the plan for what ``trainer`` is about to train; its model carries exactly the planned adapters.

    Say what to save, in one word or in several; all limits hold. The same as
    ``method_for(trainer, "selected", ...).plan``.

    Args:
        trainer: As in :func:`method_for`.
        adapters: At most so many whole adapters at the user's rank, or this share of them; half of them where no limit
            is given.
        parameters: At most so many adapter parameters, or this share of LoRA's. Ranks are free, and no batch is read.
            The trainer's ``learning_rate`` is multiplied by ``plan.learning_rate_factor``, 1 to 2.
        time: At most this share of LoRA's time: the trainer takes this share of its steps (``max_steps``). With a
            ``rule``, ``adapters`` or ``memory``: the sites whose step takes it. With ``store`` the time is that of the
            whole run, the selection and the first epoch's forward passes included: all sites above a floor, for as many
            steps as the time allows, where the loss is expected to fall furthest (``RunBudget``). The lowest floor is
            fewer steps of all layers; then nothing is stored.
        memory: The most at the peak of the device, such as ``"8GB"``: where LoRA does not fit, the trainer takes fewer
            rows at once and accumulates more (``per_device_train_batch_size``, ``gradient_accumulation_steps``). With a
            ``rule``, ``adapters`` or ``time``, or where a single row does not fit: the sites whose peak fits.
        lora: As in :func:`method_for`.
        store: Compute what lies below the lowest adapter once, by :func:`weightlora.store_frozen`; a mapping has its
            options.
        options: Further arguments of :func:`method_for` and :func:`weightlora.select`: rule, steps, seed,
            learning_rate, fast, ... With ``progress=False`` the plan is not printed.

    Raises:
        OptionError: See :func:`method_for`.
        SelectionError: See :func:`method_for`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 160
        >>> quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        >>> trainer = Trainer(base, TrainingArguments(str(tmp_path / "run"), max_steps=1, **quiet), train_dataset=rows)
        >>> plan = select_for(trainer, lora=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), parameters=0.5)
        >>> [*plan.ranks.values()], type(trainer.model).__name__
        ([1, 1], 'PeftModel')
    """
    asked = {"adapters": adapters, "parameters": parameters, "time": time, "memory": memory}
    asked |= {"epochs": planned_epochs(trainer)} if store else {}
    plan = method_for(trainer, lora=lora, **{k: v for k, v in asked.items() if v is not None}, **options).plan
    if options.get("progress", not trainer.args.disable_tqdm) and is_first():
        print(plan)  # noqa: T201 - the screen is for whoever runs the script
    if store:
        store_planned(trainer, plan, **(store if isinstance(store, Mapping) else {}))
    return plan


def adopt(trainer: Trainer, plan: AdapterPlan, *, seed: int, fast: Dropout | None = None) -> Method:
    """Give the trainer's PEFT model exactly the adapters of a plan that was made before, freshly initialised.

    Args:
        trainer: A trainer that has not trained yet, on a PEFT model with fresh LoRA adapters.
        plan: Made for the trainer's base model.
        seed: Decides A's random start.
        fast: As in :func:`method_for`.

    Raises:
        OptionError: The trainer is not fresh, or ``output_dir`` holds another plan.
        PlanMismatchError: The plan was made for another model.
    """
    lora = lora_of(trainer, None)
    require_fresh(trainer)
    if plan.options.get("warm_start"):
        warnings.warn(
            "the plan was made with warm_start=True, but a plan holds no weights: its adapters are initialised again; "
            "to start from the weights of the scoring, give the method and its options instead of the plan",
            WeightLoraWarning,
            stacklevel=2,
        )
    plan.check_sites(trainer.model)  # pyright: ignore[reportArgumentType]
    guard = guarded(trainer)
    return _attach(trainer, planned_method(plan), guard, lora, (), seed=seed, fast=fast)


def _attach(
    trainer: Trainer,
    method: Method,
    guard: PlanGuard,
    lora: LoraConfig,
    batches: Iterable[Any],
    *,
    seed: int,
    fast: Dropout | None,
    whole: bool = True,
    start: Path | None = None,
) -> Method:
    """Let the method put its adapters on the trainer's model, which stays the same object where it is a PEFT model.

    Args:
        trainer: A fresh trainer.
        method: It reads ``batches`` and attaches.
        guard: The trainer's.
        lora: The adapters wanted.
        batches: What the method reads.
        seed: Decides the adapters' random start.
        fast: The fast step's dropout.
        whole: Give the method the PEFT model as the trainer has it; else the base model in it.
        start: A file for the weights that the training starts from; None writes none.
    """
    model: Any = trainer.model
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    total_steps = planned_steps(trainer)
    # Without batches there is no forward pass.
    with placed(trainer) if batches else nullcontext(), seeded(seed), within_memory(trainer):
        attached = method.attach(model if whole else without_adapters(model), lora, batches, total_steps)
    partitioned = partitioned_dtype(attached)
    if partitioned is not None:
        cast_trained(attached, partitioned)  # DeepSpeed takes one type, and has fp32 copies of its own
    if isinstance(model, PeftModel):
        if partitioned is None and len(trained) == 1:  # TRL's choice for quantised models, or the user's
            cast_trained(attached, trained.pop())
        take_tuner(model, attached)
    else:
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = attached  # pyright: ignore
    if fast is not None:
        enable_fast_lora(trainer.model, fast)  # pyright: ignore[reportArgumentType]
    if method.begun is not None:  # before the plan, as below
        write_checkpoint(trainer, method.begun, method.plan)
        guard.begun = method.begun.steps
    if start is not None:  # before the plan: whoever finds a plan finds its weights
        from_first(partial(write_start, trainer.model, start))  # pyright: ignore[reportArgumentType]
    from_first(partial(keep_plan, method.plan, _plan_path(trainer)))
    require_heads(trainer)
    for callback in (*method.callbacks(), PlanSaver(method.plan)):
        trainer.add_callback(callback)
    guard.plan = method.plan
    _shorten(trainer, method.plan, total_steps)
    _carry_rate(trainer, method.plan)
    split_batch(trainer, method.plan)
    return method


def _shorten(trainer: Trainer, plan: AdapterPlan, total_steps: int) -> None:
    """Let the trainer take as many of its steps as the plan is made for."""
    if plan.step_share < 1:
        several = planned_epochs(trainer) > 1 and "epochs" not in plan.options
        trainer.args.max_steps = plan.steps_of(total_steps)
        if is_first():
            hint = "; a store (store=True, --store_frozen) weighs fewer layers, too" if several else ""
            _LOG.warning("the plan trains %d of %d steps (max_steps)%s", trainer.args.max_steps, total_steps, hint)


def _carry_rate(trainer: Trainer, plan: AdapterPlan) -> None:
    """Let the trainer train lower ranks at the rate that they want, the user's being that of LoRA.

    Warns:
        WeightLoraWarning: DeepSpeed was told the rate already.
    """
    factor = plan.learning_rate_factor
    if plan.rule != UNIFORM or factor == 1:
        return
    rate = trainer.args.learning_rate * factor
    if trainer.is_deepspeed_enabled:
        warnings.warn(
            f"learning_rate={trainer.args.learning_rate:g}: the plan's ranks want {factor:g} times the rate of LoRA, "
            f"and DeepSpeed was told it already; set {rate:g} yourself",
            WeightLoraWarning,
            stacklevel=2,
        )
        return
    trainer.args.learning_rate = rate
    if is_first():
        _LOG.warning("the plan trains at learning_rate=%g, %g times LoRA's, as lower ranks want it", rate, factor)


def _defaults(trainer: Trainer, entry: MethodEntry, seed: int, fast: Dropout | None) -> dict[str, Any]:
    """What methods take from the trainer, unless the user says otherwise."""
    arguments, quiet = trainer.args, quiet_copy(trainer)
    together = entry.trains == "ranks" and process_count() > 1
    begins = {"run": run_step(trainer)} if entry.begins_training else {}
    return {
        **begins,
        "seed": seed,
        "learning_rate": arguments.learning_rate,
        "loss_fn": losses(quiet) if entry.batch == "step" else micro_loss(quiet, together=together),
        "fast": fast,
        "progress": not arguments.disable_tqdm,
    }


def _reads_batches(entry: MethodEntry, options: Mapping[str, Any]) -> bool:
    """Whether the method's choice reads batches; a selection does not where ranks and steps are free."""
    if not entry.reuses_plan:
        return entry.reads != "nothing"
    asked = {key for key in (*LIMITS, "rule", "epochs") if options.get(key) is not None}
    return not asked or not asked <= {"parameters", "time"}


def _batches(trainer: Trainer, entry: MethodEntry, seed: int) -> tuple[Any, Iterable[Any]]:
    """The first of the training's own batches, and all of them in the order that the seed decides."""
    require_weights(trainer)
    model: Any = trainer.model
    if trainer.args.activation_checkpointing:  # as trainer.train() will do
        given: Any = trainer.args.activation_checkpointing_kwargs
        settings: dict[str, Any] = dict(given or {})
        placing = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
        model.activation_checkpointing_enable(settings or None, **placing)
    remove_input_hooks(model)  # as PlanGuard will do
    quiet = quiet_copy(trainer)
    with seeded(seed):  # before anything else is drawn: the loader's order must not depend on the adapters
        return peeked(optimizer_steps(quiet) if entry.batch == "step" else micro_batches(quiet))


def _plan_path(trainer: Trainer) -> Path:
    return Path(str(trainer.args.output_dir)) / PLAN_FILE


def _require_possible(trainer: Trainer, entry: MethodEntry, fast: Dropout | None) -> None:
    """Raise where a method cannot train in a sharded or copied model, or with the fast step.

    Raises:
        OptionError: It cannot.
    """
    if fast is not None and entry.trains == "other":
        raise OptionError(f"fast={fast!r}: {entry.name} does not train LoRA's A and B; leave fast out")
    if entry.begins_training:
        require_whole(trainer, entry.name)
    if entry.trains == "ranks" and is_parted(trainer):
        raise OptionError(
            f"{entry.name} changes ranks or gradients of whole matrices while it trains, and FSDP, DeepSpeed and "
            "tensor parallelism part them; run it in one process, or in several without these (DDP)"
        )
    if entry.trains == "other" and (process_count() > 1 or is_parted(trainer)):
        raise OptionError(
            f"{entry.name} does not train stock LoRA from beginning to end, which works in one process only; run it in "
            "one"
        )
    model: Any = trainer.model
    if entry.trains != "lora" and is_offloaded(model):
        raise OptionError(
            f"{entry.name} does not train stock LoRA from beginning to end, which needs weights in memory; load the "
            "model without offloading"
        )
