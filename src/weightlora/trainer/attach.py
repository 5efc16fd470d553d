"""Any method of the registry in an existing script: ``method = weightlora.method_for(trainer, "adalora")``.

trainer → its own batches and loss → method → the trainer's model with that method's adapters, its callbacks registered
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from weightlora.errors import OptionError
from weightlora.fast.dropout import Dropout
from weightlora.fast.enable import enable_fast_lora
from weightlora.methods import Method, entry_of, make_method, options_of
from weightlora.methods.base import ExpandedMethod, trains_stock
from weightlora.methods.common.export import cast_trained, take_tuner
from weightlora.model.distributed import from_first, process_count
from weightlora.model.restore import seeded
from weightlora.selection.warmup import peeked
from weightlora.trainer.loader import micro_batches, micro_loss, planned_steps, quiet_copy
from weightlora.trainer.placement import placed, require_heads, require_weights
from weightlora.trainer.select_for import PLAN_FILE, PlanGuard, keep_plan, lora_of, require_fresh


def method_for(
    trainer: Trainer, name: str, *, seed: int | None = None, fast: Dropout | None = None, **options: Any
) -> Method:
    """Put the adapters of a method on the trainer's model, and let the trainer call what the method does in training.

    The method looks at the trainer's own batches through the trainer's own loss. Its plan is written to
    ``output_dir/plan.json`` and into every checkpoint; after ``trainer.train()``, ``method.export(trainer.model)``
    returns stock LoRA.

    Args:
        trainer: A trainer that has not trained yet, on a PEFT model with fresh LoRA adapters: the budget.
        name: One of :data:`weightlora.METHODS`.
        seed: Decides all random numbers; None takes the trainer's.
        fast: Train with the step of :func:`weightlora.enable_fast_lora`, with this ``dropout``; None is PEFT's.
        options: The method's own.

    Raises:
        OptionError: There is no such method or option, the trainer is not fresh, or ``output_dir`` holds another plan.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
        >>> quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        >>> trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=1, **quiet), train_dataset=rows)
        >>> method = method_for(trainer, "random", keep=1)
        >>> len(method.plan.names), trainer.model is model
        (1, True)
    """
    lora = lora_of(trainer, None)
    require_fresh(trainer)
    arguments = trainer.args
    seed = arguments.seed if seed is None else seed
    quiet = quiet_copy(trainer)
    given = {"seed": seed, "lr": arguments.learning_rate, "loss_fn": micro_loss(quiet), "fast": fast}
    method = make_method(name, **{k: v for k, v in given.items() if k in options_of(name)}, **options)
    _require_possible(trainer, method, name, fast)
    total = planned_steps(trainer)
    batches: Any = ()
    if entry_of(name).hears != "nothing":
        require_weights(trainer)
        with seeded(seed):  # the loader's order must not depend on the adapters
            _, batches = peeked(micro_batches(quiet))

    guard = PlanGuard()
    trainer.add_callback(guard)
    model: Any = trainer.model
    (dtype, *others) = {p.dtype for p in model.parameters() if p.requires_grad}
    with placed(trainer), seeded(seed):
        attached: PeftModel = method.attach(model.base_model.unload(), lora, batches, total)
    if not others:  # TRL's choice for quantised models, or the user's
        cast_trained(attached, dtype)
    take_tuner(model, attached)
    if fast is not None:
        enable_fast_lora(model, fast)
    from_first(partial(keep_plan, method.plan, Path(str(arguments.output_dir)) / PLAN_FILE))
    for callback in method.callbacks():
        trainer.add_callback(callback)
    require_heads(trainer)
    guard.plan = method.plan
    return method


def _require_possible(trainer: Trainer, method: Method, name: str, fast: Dropout | None) -> None:
    """Raise where something else than stock LoRA would be trained in a model that is wrapped or parted, or fast."""
    if fast is not None and isinstance(method, ExpandedMethod):
        raise OptionError(f"fast={fast!r}: {name} does not train plain LoRA, whose step that is; leave fast out")
    parted = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not trains_stock(method) and (process_count() > 1 or parted):
        raise OptionError(
            f"{name} does not train stock LoRA from beginning to end, which works in one process only; run it in one"
        )
