"""A recipe → its trainer: rows, tokenizer, base model, and plain LoRA on all candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, MissingPackageError, OptionError, SiteError, WeightLoraError, require_extra
from weightlora.model.layers import unchecked_patterns
from weightlora.model.sites import TASK_HEADS, find_sites
from weightlora.plan.make import make_plan
from weightlora.runs.recipe import Recipe, TaskOptions
from weightlora.tasks import find_task, kind_of, load_model
from weightlora.tasks.base import Prepared, RowOptions, Task
from weightlora.tasks.embedded import embedded_model
from weightlora.tasks.pretrained import load_tokenizer
from weightlora.tasks.rows import Source, load_rows, with_columns
from weightlora.text import closest

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import Trainer, TrainerCallback


def make_trainer(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    measured: bool = True,
    few: int | None = None,
    adapter: Path | None = None,
) -> tuple[Prepared, Trainer, Mapping[str, int]]:
    """Return what measures a recipe, its trainer on the base model with adapters, and its rows.

    Args:
        recipe: What to run.
        callbacks: Further callbacks of the trainer.
        measured: False loads the training rows only.
        few: Measure only so many rows of each split; the rows that are counted are all of them.
        adapter: The folder of the adapter; None is plain LoRA on all candidates.

    Raises:
        DataError: Rows or model are missing or malformed.
        MissingPackageError: A training argument needs a package that is not installed.
        OptionError: The trainer refuses a training argument.
    """
    task = _task(recipe.task)
    kind = kind_of(task)
    rows = load_rows(task, _source(recipe.task), seed=recipe.training.data_seed or 0, measured=measured)
    counts = {str(split): len(some) for split, some in rows.items()}
    if few is not None:
        task, rows = _with_few(task, rows, few)
    path, loading = _pretrained(recipe, kind.TASK_TYPE)
    tokenizer = load_tokenizer(path, **{k: v for k, v in loading.items() if k in ("gguf_file", "revision")})
    prepared = kind.prepare(task, rows, tokenizer, _row_options(recipe.task))
    base = load_model(path, task, rows, seed=recipe.training.seed, **loading)
    model = _with_lora(base, recipe, kind.TASK_TYPE) if adapter is None else _with_adapter(base, adapter)
    try:
        return prepared, prepared.make_trainer(model, recipe.training, callbacks), counts
    except WeightLoraError:
        raise
    except ImportError as error:  # of an optimizer, or of a tracker in report_to; the text says what to install
        raise MissingPackageError(" ".join(str(error).split())) from error
    except ValueError as error:  # training arguments that the trainer refuses
        raise OptionError(" ".join(str(error).split())) from error


def _with_few(task: Task, rows: DatasetDict, few: int) -> tuple[Task, DatasetDict]:
    """Only the first rows of the splits that are measured; the harness loads its own."""
    cut: Any = type(rows)()
    cut.update({s: some if s == "train" else some.select(range(min(few, len(some)))) for s, some in rows.items()})
    return replace(task, options={**task.options, "limit": few}) if "harness" in task.options else task, cut


def _task(options: TaskOptions) -> Task:
    task = with_columns(find_task(options.task), options.columns)
    if options.harness_path is not None:
        task = replace(task, options={**task.options, "include_path": options.harness_path})
    return task


def _source(options: TaskOptions) -> Source:
    names = ("dataset_name", "dataset_config_name", "train_file", "validation_file")
    return Source(
        **{name: getattr(options, name) for name in names},
        max_train_samples=options.max_train_samples,
        max_eval_samples=options.max_eval_samples,
        held_out_samples=options.held_out_samples,
    )


def _row_options(options: TaskOptions) -> RowOptions:
    return RowOptions(
        max_length=options.max_seq_length,
        max_target_length=options.max_target_length,
        doc_stride=options.doc_stride,
        num_beams=options.num_beams,
        teacher_forced=options.teacher_forced,
    )


def _pretrained(recipe: Recipe, task_type: str) -> tuple[str, dict[str, Any]]:
    """The model's path and what ``from_pretrained`` is told beside it."""
    from transformers import BitsAndBytesConfig

    options = recipe.model
    path, gguf = embedded_model(options.model_name_or_path) or (options.model_name_or_path, options.gguf_file)
    loading: dict[str, Any] = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    if gguf is not None:
        loading["gguf_file"] = gguf
    if options.model_revision != "main":
        loading["revision"] = options.model_revision
    if options.attn_implementation is not None:
        loading["attn_implementation"] = options.attn_implementation
    if options.load_in_8bit or options.load_in_4bit:
        require_extra("bitsandbytes", "quantised")
        whole = [*TASK_HEADS.get(task_type, ()), *recipe.method.lora_modules_to_save]
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.load_in_8bit,
            load_in_4bit=options.load_in_4bit,
            bnb_4bit_quant_type="nf4",
            # What is trained whole cannot be quantised; by itself transformers spares a head only if it has no bias.
            llm_int8_skip_modules=[*whole, "lm_head"] if whole else None,
        )
    return path, loading


def _require_modules(base: Any, names: Sequence[str]) -> None:
    """Raise where a module to train whole does not exist; PEFT ignores its name."""
    ends = {name.rpartition(".")[2] for name, _ in base.named_modules() if name}
    whole = {name for name, _ in base.named_modules()}
    for name in names:
        if not any(found == name or found.endswith(f".{name}") for found in whole):
            raise SiteError(
                f"lora_modules_to_save: the model has no module {name!r}{closest(name, ends)}; there are "
                f"{', '.join(sorted(end for end in ends if not end.isdigit()))}"
            )


def _with_adapter(base: Any, folder: Path) -> Any:
    """Put a trained adapter on the model.

    Raises:
        DataError: It does not fit the model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError) as error:  # PyTorch's list of shapes has a line for each
        reason = " ".join(str(error).split())
        raise DataError(f"{folder} does not fit {base.name_or_path or 'the base model'}: {reason:.200}") from error


def _with_lora(base: Any, recipe: Recipe, task_type: str) -> Any:
    """Put the budget on the model: plain LoRA on all candidates, of which the plan keeps some."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    options = recipe.method
    if recipe.model.load_in_8bit or recipe.model.load_in_4bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    targets: Any = options.lora_target_modules or None
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=options.lora_modules_to_save or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type=task_type,
    )
    _require_modules(base, options.lora_modules_to_save)
    found = find_sites(base, lora)
    lora.target_modules = [site.name for site in found.sites]
    if found.parameters:  # fused experts, with ranks of their own
        lora = make_plan(found.sites, lora, lora.target_modules, target_parameters=found.parameters).to_lora_config()
    with unchecked_patterns():
        return get_peft_model(base, lora)
