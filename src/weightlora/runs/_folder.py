"""A run's folder: its options, the small files that an earlier start left there, and the trained adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from weightlora.errors import DataError, OptionError, OutputError
from weightlora.files import read_json, read_mapping, remove_drafts
from weightlora.folders import RECORD_FILE, own_files, remove_own_file, whole_folder
from weightlora.model.distributed import is_first
from weightlora.plan.card import CARD_FILE, write_base_model_name, write_card
from weightlora.plan.plan import ADAPTER_FILES, AdapterPlan, tensor_shapes
from weightlora.runs.files import (
    ADAPTER,
    BATCH_FILE,
    BEFORE_FILE,
    CONFIG_FILE,
    HEATMAP_FILE,
    RESULTS_FILE,
    TRAIN,
    checkpoints,
    require_output,
)
from weightlora.trainer.batch_size import Batch
from weightlora.trainer.guard import PLAN_FILE

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

#: Options that do not say what is trained: where a run is, from where it resumes, and what it shows.
_UNTRAINED = ("output_dir", "resume_from_checkpoint", "disable_tqdm")
#: What a run writes into its folder once its options are there, and never replaces.
_NEW = (HEATMAP_FILE, BEFORE_FILE, RESULTS_FILE)
#: What the Trainer copies there to push checkpoints.
_PUSHED = (*ADAPTER_FILES, "training_args.bin")
#: What the results of every run hold.
_RESULTS = (
    "metrics",
    "before",
    "method",
    "adapters",
    "sites",
    "kept",
    "adapter_parameters",
    "lora_parameters",
    "steps",
)


def remove_drafts_of_checkpoints(output: Path) -> None:
    """Remove what a killed start of the run had not finished writing in its checkpoints."""
    for folder in checkpoints(output):
        remove_drafts(folder)


def require_same_run(output: Path, settings: Mapping[str, Any]) -> None:
    """Raise where the folder holds a run with other options; one that has no plan yet has done nothing.

    Raises:
        OptionError: With the options that differ.
        DataError: The run's options cannot be read.
        OutputError: Another command wrote there, or a file of the user would be lost.
    """
    file = output / CONFIG_FILE
    new = [*_NEW, *(_PUSHED if settings.get("push_to_hub") else ())]
    require_output(output, TRAIN, new=() if file.exists() else new)
    trained = bool(checkpoints(output)) or (output / RESULTS_FILE).exists()
    if not trained and not (file.exists() and (output / PLAN_FILE).exists()):
        if not _is_same(file, settings):
            require_output(output, TRAIN, [CONFIG_FILE], new)
        return
    there = read_mapping(file) if file.exists() else {}
    if not there:
        raise DataError(
            f"{output} holds a trained run, but its options are not in {file}; choose another output_dir, or delete "
            "what is there"
        )
    changed = _changed(there, settings)
    if changed:
        faults = [f"{key}: {there.get(key)!r} there, {settings.get(key)!r} now" for key in changed]
        raise OptionError(
            f"{output} holds a run with other options ({'; '.join(faults[:5])}); choose another output_dir"
        )


def write_config(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the effective options of a run, where they are not there; the folder is the run's from now on."""
    import yaml

    with own_files(output, TRAIN) as draft:
        if not _is_same(output / CONFIG_FILE, settings):
            text = yaml.safe_dump(dict(settings), allow_unicode=True, sort_keys=False)
            (draft / CONFIG_FILE).write_text(text, encoding="utf-8")
            remove_own_file(output / HEATMAP_FILE, TRAIN)  # of a plan that is there no more


def _is_same(file: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a file holds the options of this run."""
    return file.exists() and not _changed(read_mapping(file), settings)


def _changed(there: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The options that say what is trained, and differ."""
    names = sorted({*there, *settings} - {*_UNTRAINED}, key=str)
    return [name for name in names if there.get(name) != settings.get(name)]


def stored_results(output: Path) -> dict[str, Any] | None:
    """Return the results of a finished run; None where it is not finished.

    Raises:
        DataError: The file is damaged, or the adapter that it tells of is.
    """
    path = output / RESULTS_FILE
    results = _stored_mapping(path, "write it again from the last checkpoint")
    if results is None:
        return None
    missing = [key for key in _RESULTS if key not in results]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; delete it to write it again from the last checkpoint")
    _require_metrics(path, results["metrics"], "write it again from the last checkpoint")
    try:
        AdapterPlan.load(output / ADAPTER / PLAN_FILE)
        read_json(output / ADAPTER / ADAPTER_FILES[0])
        tensor_shapes(output / ADAPTER)
    except Exception as error:  # safetensors has its own type
        raise DataError(
            f"{path} tells of an adapter that is missing or damaged ({' '.join(str(error).split())}); delete {path} to "
            "write both again from the last checkpoint"
        ) from error
    return results


def stored_before(output: Path) -> dict[str, Any] | None:
    """Return the stored metrics of the base model; None where they are not measured yet.

    Raises:
        DataError: The file is damaged.
    """
    metrics = _stored_mapping(output / BEFORE_FILE, "measure the base model again")
    if metrics is not None:
        _require_metrics(output / BEFORE_FILE, metrics, "measure the base model again")
    return metrics


def stored_batch(output: Path, asked: Batch) -> Batch | None:
    """Return the batch that an earlier start found; None where there was none.

    Raises:
        DataError: The file is damaged, or its batch makes other optimizer steps than ``asked``.
    """
    path = output / BATCH_FILE
    stored = _stored_mapping(path, "look for the batch again")
    if stored is None:
        return None
    for batch in asked.candidates:
        if stored == {"rows": batch.rows, "accumulation": batch.accumulation}:
            return batch
    raise DataError(
        f"{path} holds {stored!r:.80}, which is no batch of this run; delete it to look for the batch again"
    )


def _stored_mapping(path: Path, what: str) -> dict[str, Any] | None:
    """The mapping in a JSON file; None where there is no file. Deleting it makes the run do ``what``."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; delete it to {what}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; delete it to {what}")
    return cast("dict[str, Any]", content)


def _require_metrics(path: Path, metrics: Any, what: str) -> None:
    values = list(cast("dict[str, Any]", metrics).values()) if isinstance(metrics, dict) else [metrics]
    if not values or not all(type(value) in (int, float) for value in values):
        raise DataError(f"{path} holds no metrics, or some that are not numbers; delete it to {what}")


# -- the adapter -------------------------------------------------------------------------------------------------------


def save_adapter(trainer: Trainer, plan: AdapterPlan, path: Path) -> None:
    """Write the trained adapter as a stock PEFT folder with its plan and card, whole or not at all."""
    found: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on all processes: each may hold a shard
    if not is_first():  # DeepSpeed gives the others nothing
        return
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in found.items()}  # torch.compile's prefix
    with whole_folder(path, TRAIN) as draft:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)  # type: ignore[arg-type]
        model.save_pretrained(str(draft), state_dict=weights)
        write_base_model_name(draft, model)
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(draft))
        plan.save(draft / PLAN_FILE)
        write_card(draft, plan, model)


def write_metrics(trainer: Trainer, plan: AdapterPlan, path: Path, metrics: Mapping[str, float]) -> None:
    """Write the card of a saved adapter anew, with what was measured."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)  # type: ignore[arg-type]
    if is_first():
        with own_files(path, TRAIN) as draft:
            for name in (CARD_FILE, ADAPTER_FILES[0], "tokenizer_config.json"):  # what the card is made of
                if (path / name).exists():
                    shutil.copyfile(path / name, draft / name)
            write_card(draft, plan, model, metrics=metrics)


def require_hub(token: str | None) -> None:
    """Raise where nothing could be pushed; better before the training than after it.

    Raises:
        OptionError: The hub does not answer, or knows no such token.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=_token(token)).whoami()
    except Exception as error:  # the hub's own kin, and what its transport raises
        raise OptionError(
            f"push_to_hub: the hub knows no such user: {_first_line(error)}; log in with `hf auth login`, give "
            "hub_token, or leave push_to_hub out"
        ) from error


def push_adapter(folder: Path, repository: Any, arguments: TrainingArguments) -> None:
    """Upload an adapter directory over what the checkpoints pushed.

    Raises:
        OutputError: The hub did not take it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=_token(arguments.hub_token)).upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[RECORD_FILE],
            commit_message="End of training",
            revision=arguments.hub_revision,
        )
    except Exception as error:  # as above
        raise OutputError(
            f"cannot push {folder} to {repository}: {_first_line(error)}; the same command tries again"
        ) from error


def _token(token: Any) -> str | None:
    return None if token is None else str(token)  # transformers gives its type a bool too


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
