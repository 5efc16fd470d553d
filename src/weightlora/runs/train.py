"""A recipe → base model, plan, trained stock adapter, metrics; stopped at any moment, the same command goes on.

output_dir/config.yaml   the effective options, written when everything has been found to fit
output_dir/before.json   metrics of the base model, with eval_on_start
output_dir/plan.json     which sites carry adapters, as soon as it is known
output_dir/batch.json    the batch that was found, with grow_batch
output_dir/checkpoint-*  the Trainer's own
output_dir/adapter/      the trained adapter: stock PEFT, with plan.json and a model card
output_dir/results.json  metrics, parameters and seconds, written last
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError
from weightlora.files import whole_file, whole_folder, writable_folder, write_json
from weightlora.methods import Method, make_method, options_of
from weightlora.methods.base import trains_stock
from weightlora.methods.common.callback import take_up
from weightlora.model.distributed import from_first, is_first
from weightlora.model.sites import TASK_HEADS, find_sites
from weightlora.plan.budget import read_keep
from weightlora.plan.plan import AdapterPlan
from weightlora.runs._hub import push_adapter, require_hub
from weightlora.runs.recipe import Recipe, TaskOptions
from weightlora.tasks import find_task, kind_of
from weightlora.tasks.base import Prepared, RowOptions, Task
from weightlora.tasks.embedded import embedded_model
from weightlora.tasks.pretrained import load_tokenizer
from weightlora.tasks.rows import Source, load_rows, with_columns
from weightlora.trainer.attach import method_for
from weightlora.trainer.batch_size import Batch, grown_batch, require_growable, use_batch
from weightlora.trainer.placement import require_measurable
from weightlora.trainer.select_for import PLAN_FILE, adopt, select_for

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

CONFIG_FILE, BEFORE_FILE, RESULTS_FILE = "config.yaml", "before.json", "results.json"
BATCH_FILE, HEATMAP_FILE, ADAPTER = "batch.json", "heatmap.png", "adapter"
#: What a whole checkpoint holds at least; a run that was killed while it wrote one leaves less.
_CHECKPOINT_FILES = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json", PLAN_FILE)


def train(recipe: Recipe, *, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run a recipe and return its results, which are also in ``output_dir/results.json``.

    When ``output_dir`` holds the same run, it goes on from its plan and its last whole checkpoint; when that run is
    finished, its results are returned.

    Args:
        recipe: What to run.
        callbacks: Further callbacks of the trainer.

    Raises:
        OptionError: ``output_dir`` holds another run, or an option does not fit.
        DataError: Rows, model or checkpoint are missing or malformed.
        PlanMismatchError: The plan was made for another model.
    """
    output = recipe.output_dir
    settings = recipe.settings  # before there is a trainer, whose accelerator forgets its state over other arguments
    from_first(lambda: _require_same_run(writable_folder(output), settings))
    finished = from_first(partial(_read_json, output / RESULTS_FILE))
    if finished is not None:
        return finished

    if recipe.training.push_to_hub:
        from_first(partial(require_hub, recipe.training.hub_token))
    prepared, trainer = make_trainer(recipe, callbacks)
    if recipe.training.eval_on_start:
        require_measurable(trainer)
    if recipe.method.grow_batch:
        _require_still(recipe)
        require_growable(trainer)

    from_first(lambda: _write_config(output, settings))  # before this, a mistake leaves nothing behind
    start = time.perf_counter()
    plan, method = plan_for(trainer, recipe)
    if recipe.method.grow_batch:
        _grow(trainer, plan, recipe)
    selected = time.perf_counter()
    before = from_first(partial(_read_json, output / BEFORE_FILE))
    if recipe.training.eval_on_start and before is None:
        before = prepared.measure(trainer)  # B is zero: this is the base model
        if is_first():
            write_json(output / BEFORE_FILE, before)
    begin = time.perf_counter()
    sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    checkpoint = from_first(partial(_resume_point, recipe, plan, sharded=sharded))
    if checkpoint is not None and not sharded and _is_last(Path(checkpoint)):
        _take(trainer, Path(checkpoint))
        take_up(method.callbacks() if method is not None else (), Path(checkpoint), trainer.state.max_steps)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    end = time.perf_counter()
    if method is not None:  # what is measured below is what is saved
        method.export(trainer.model)  # pyright: ignore[reportArgumentType]
        plan = method.plan
    _save_adapter(trainer, plan, output / ADAPTER)
    if recipe.training.push_to_hub and is_first():
        push_adapter(output / ADAPTER, trainer.hub_model_id, recipe.training)
    results = {
        "metrics": prepared.measure(trainer),
        "before": before,
        "method": recipe.method.method if recipe.method.plan is None else "plan",
        "adapters": len(plan.names),
        "sites": len(plan.entries),
        "adapter_parameters": plan.parameters,
        "lora_parameters": plan.lora_parameters,
        "selection_seconds": round(selected - start, 2),
        "training_seconds": round(end - begin, 2),
        "steps": trainer.state.global_step,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
    }
    if is_first():
        write_json(output / RESULTS_FILE, results)
    return results


def make_trainer(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> tuple[Prepared, Trainer]:
    """Return the recipe's trainer, on the base model with plain LoRA on all candidates, and what measures it.

    Raises:
        DataError: Rows or model are missing or malformed.
    """
    task = _task(recipe.task)
    kind = kind_of(task)
    rows = load_rows(task, _source(recipe.task), seed=recipe.training.data_seed or 0)
    path, loading = _pretrained(recipe, kind.TASK_TYPE)
    tokenizer = load_tokenizer(path, **{k: v for k, v in loading.items() if k in ("gguf_file", "revision")})
    prepared = kind.prepare(task, rows, tokenizer, _row_options(recipe.task))
    base = kind.load_model(path, task, rows, seed=recipe.training.seed, **loading)
    return prepared, prepared.make_trainer(_with_lora(base, recipe, kind.TASK_TYPE), recipe.training, callbacks)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _require_same_run(output: Path, settings: Mapping[str, Any]) -> None:
    """Raise where the folder holds a run with other options; one that has no plan yet has done nothing."""
    import yaml

    file = output / CONFIG_FILE
    if not (file.exists() and (output / PLAN_FILE).exists()):
        return
    there = yaml.safe_load(file.read_text(encoding="utf-8"))
    changed = [key for key in sorted({*there, *settings}) if there.get(key) != settings.get(key)]
    faults = [f"{k}: {there.get(k)!r} there, {settings.get(k)!r} now" for k in changed if k != "resume_from_checkpoint"]
    if faults:
        raise OptionError(
            f"{output} holds a run with other options ({'; '.join(faults[:5])}); choose another output_dir"
        )


def _write_config(output: Path, settings: Mapping[str, Any]) -> None:
    import yaml

    with whole_file(output / CONFIG_FILE) as draft:
        draft.write_text(yaml.safe_dump(dict(settings), allow_unicode=True, sort_keys=False), encoding="utf-8")


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
    return RowOptions(options.max_seq_length, options.max_target_length, options.doc_stride, options.num_beams)


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
    if options.load_in_8bit or options.load_in_4bit:
        whole = [*TASK_HEADS.get(task_type, ()), *recipe.method.lora_modules_to_save]
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.load_in_8bit,
            load_in_4bit=options.load_in_4bit,
            bnb_4bit_quant_type="nf4",
            # What is trained whole cannot be quantised; by itself transformers spares a head only if it has no bias.
            llm_int8_skip_modules=[*whole, "lm_head"] if whole else None,
        )
    return path, loading


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
    lora.target_modules = [site.name for site in find_sites(base, lora).sites]
    return get_peft_model(base, lora)


def plan_for(trainer: Trainer, recipe: Recipe) -> tuple[AdapterPlan, Method | None]:
    """Find the plan by the recipe's method and give the trainer's model the planned adapters.

    Raises:
        OptionError: An option does not fit, or ``output_dir`` holds another plan.
    """
    options, seed = recipe.method, recipe.training.seed
    if options.plan is not None:
        return adopt(trainer, AdapterPlan.load(options.plan), seed=seed, fast=options.fast), None
    keep = read_keep(options.keep)
    if options.method in ("weightlora", "weightlora_plus"):  # they listen to the trainer's own loss
        names = ("rule", "steps", "head_steps", "threshold_every", "threshold", "gate_lr", "fast")
        warmup = {**{name: getattr(options, name) for name in names}, **options.own}
        return select_for(trainer, keep=keep, expand=options.method == "weightlora_plus", **warmup), None
    given = {"keep": keep} if "keep" in options_of(options.method) else {}
    method = method_for(trainer, options.method, seed=seed, fast=options.fast, **{**given, **options.own})
    return method.plan, method


def _require_still(recipe: Recipe) -> None:
    if recipe.method.plan is None and not trains_stock(make_method(recipe.method.method)):
        raise OptionError(
            f"grow_batch: {recipe.method.method} does not train stock LoRA from beginning to end, whose memory is "
            "measured; leave grow_batch out"
        )


def _grow(trainer: Trainer, plan: AdapterPlan, recipe: Recipe) -> None:
    """Train with the batch that was found at the first start; what a device measures may differ at the next."""
    path = recipe.output_dir / BATCH_FILE
    stored = from_first(partial(_read_json, path))
    batch = grown_batch(trainer, plan, fast=recipe.method.fast) if stored is None else Batch(**stored)
    if stored is None and is_first():
        write_json(path, asdict(batch))
    use_batch(trainer, batch)


def _resume_point(recipe: Recipe, plan: AdapterPlan, *, sharded: bool) -> str | None:
    """The checkpoint that the run goes on from: the one asked for, else the last whole one."""
    asked = recipe.training.resume_from_checkpoint
    if asked is not None and str(asked).lower() != "true":
        folder = Path(str(asked))
        missing = [name for name in _CHECKPOINT_FILES if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} is no whole checkpoint of a planned run: it lacks {', '.join(missing)}")
        if AdapterPlan.load(folder / PLAN_FILE).ranks != plan.ranks:
            raise DataError(f"{folder} was trained on another plan than {recipe.output_dir / PLAN_FILE}")
        return str(folder)
    folders = sorted(recipe.output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    whole = [folder for folder in folders if all((folder / name).is_file() for name in _CHECKPOINT_FILES)]
    if sharded:  # what cannot be taken as it is, see below, is trained again from the one before
        whole = [folder for folder in whole if not _is_last(folder)]
    return str(whole[-1]) if whole else None


def _is_last(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def _take(trainer: Trainer, checkpoint: Path) -> None:
    """Give the trainer what its training ended in; going on from the last checkpoint, it would take one more step."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    weights = load_file(Path(best or checkpoint) / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)


def _save_adapter(trainer: Trainer, plan: AdapterPlan, path: Path) -> None:
    """Write the trained adapter as a stock PEFT directory with its plan and card, whole or not at all."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on all processes: each may hold a shard
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}  # torch.compile's prefix
    if not is_first():
        return
    with whole_folder(path) as draft:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(draft), state_dict=weights)  # type: ignore[union-attr]
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(draft))
        plan.save(draft / PLAN_FILE)
        _write_card(draft / "README.md", plan)


def _write_card(path: Path, plan: AdapterPlan) -> None:
    """Add the table of the selection to the card that PEFT wrote."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    data: Any = card.data
    data.tags = sorted({*(data.tags or []), "lora", "weightlora"})
    lines = [
        "## Selection",
        "",
        f"Rule `{plan.rule}`, seed {plan.seed}: {len(plan.names)} of {len(plan.entries)} sites, "
        f"{plan.parameters:,} adapter parameters (LoRA on all: {plan.lora_parameters:,}).",
        "",
        "| projection | sites kept | rank | layers |",
        "| --- | --- | --- | --- |",
    ]
    for projection in sorted({entry.site.projection for entry in plan.entries}):
        sites = [entry for entry in plan.entries if entry.site.projection == projection]
        kept = [entry for entry in sites if entry.r > 0]
        ranks = ", ".join(str(r) for r in sorted({entry.r for entry in kept})) or "–"
        layers = sorted({int(entry.site.block.rpartition(".")[2]) for entry in kept if entry.site.block})
        lines.append(f"| {projection} | {len(kept)} of {len(sites)} | {ranks} | {' '.join(map(str, layers)) or '–'} |")
    card.text += "\n\n" + "\n".join(lines) + "\n"
    card.save(path)
