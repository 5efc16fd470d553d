"""An adapter that is written: its plan, its model card, and the names of its base model and classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import MissingPackageError
from weightlora.files import write_json, write_text
from weightlora.folders import whole_folder
from weightlora.model.modules import base_of, config_of
from weightlora.plan._data import PlanData
from weightlora.plan.attach import require_adapters
from weightlora.plan.heatmap import draw_heatmap, ordered_projections
from weightlora.text import in_code, in_markdown

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

CARD_FILE, PICTURE_FILE = "README.md", "plan.png"
#: ``id2label`` and ``label2id`` as transformers' config.json has them. With a config.json itself, transformers would
#: take the folder for a whole model.
LABELS_FILE = "labels.json"

#: PEFT's loader for each task type, and what is printed of the model's answer to a text.
_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_GENERATED = "tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True)"
_ANSWERS = {
    "SEQ_CLS": "model.config.id2label[model(**inputs).logits.argmax().item()]",
    "CAUSAL_LM": _GENERATED,
    "SEQ_2_SEQ_LM": _GENERATED,
}


def base_model_name(model: nn.Module) -> str | None:
    """The name or path that a transformers model, with or without adapters, was loaded from; None where it has none."""
    config = config_of(model)
    return None if config is None else config.name_or_path or None


def write_base_model_name(folder: Path, model: nn.Module) -> None:
    """Write the name of ``model``'s base into the configuration of a saved adapter.

    PEFT writes the path of the files that were loaded, which for an embedded model is a folder of this machine.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote; without a configuration in it, nothing is done.
        model: The model that was saved.
    """
    name, file = base_model_name(model), folder / "adapter_config.json"
    if not file.exists():
        return
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    written = config.get("base_model_name_or_path")
    if name is None or written is None or written == name:
        return
    config["base_model_name_or_path"] = name
    write_text(file, json.dumps(config, indent=2, sort_keys=True))  # as PEFT writes it


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's classes in their order; () where they are only transformers' LABEL_0, LABEL_1, ..."""
    config = config_of(model)
    given: Any = (config.id2label if config else None) or {}
    names = [str(name) for _, name in sorted((int(number), name) for number, name in given.items())]
    return () if names == [f"LABEL_{number}" for number in range(len(names))] else tuple(names)


def is_from_gguf(model: nn.Module) -> bool:
    """Whether a model's weights were read from a GGUF file of this machine, which rounds them."""
    from transformers import PreTrainedModel

    base = base_of(model)
    return isinstance(base, PreTrainedModel) and any(Path(base.name_or_path or "nowhere").glob("*.gguf"))


def write_card(
    folder: Path,
    plan: PlanData,
    model: nn.Module,
    *,
    metrics: Mapping[str, float] | None = None,
    picture: bool = True,
) -> None:
    """Write the card in the place of PEFT's template, with ``plan.png`` and ``labels.json`` beside it.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote. The front matter of its card is kept.
        plan: The adapter's.
        model: The model that was saved.
        metrics: What was measured after the training.
        picture: Whether the plan is drawn; without matplotlib it is not.

    Raises:
        OutputError: The folder cannot be written.
    """
    config = _read(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path") or plan.base_model or ""
    labels = class_names(model) if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    drawn = picture and _drawn(plan, folder / PICTURE_FILE)
    if labels:
        label2id = {name: number for number, name in enumerate(labels)}
        write_json(folder / LABELS_FILE, {"id2label": dict(enumerate(labels)), "label2id": label2id})
    tokenizer = "adapter" if (folder / "tokenizer_config.json").exists() else repr(base)
    lines = [
        *_introduction(plan, base, rounded=is_from_gguf(model)),
        *_loading(str(config.get("task_type")), base, tokenizer, labels),
        *_selection(plan, drawn=drawn),
        *_measured(metrics or {}),
    ]
    write_text(folder / CARD_FILE, _front_matter(folder, base) + "\n".join(lines) + "\n")


def write_adapter(plan: PlanData, model: PeftModel, path: str | Path) -> None:
    """Write ``model``'s adapter with its plan and card; see :meth:`weightlora.AdapterPlan.save_adapter`."""
    from safetensors import SafetensorError

    require_adapters(plan, model)
    with whole_folder(path, "save_adapter") as draft:
        try:
            model.save_pretrained(str(draft))
        except SafetensorError as error:  # raised when the disk is full
            raise OSError(str(error)) from error
        write_base_model_name(draft, model)
        plan.save(draft / "plan.json")
        write_card(draft, plan, model)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _front_matter(folder: Path, base: str) -> str:
    """PEFT's, with tags of ours; without a base model that is no name on the hub, where it would be refused."""
    from huggingface_hub import ModelCard, ModelCardData

    file = folder / CARD_FILE
    data: Any = ModelCard.load(file).data if file.exists() else ModelCardData(library_name="peft")
    tags = {tag for tag in data.tags or () if not tag.startswith("base_model:")}
    data.base_model = None
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists():
        data.base_model = base
        tags.add(f"base_model:adapter:{base}")
    data.tags = sorted({*tags, "lora", "weightlora"})
    return f"---\n{data.to_yaml()}\n---\n\n"


def _introduction(plan: PlanData, base: str, *, rounded: bool) -> Iterator[str]:
    yield f"# LoRA adapter of {in_markdown(base) or 'a model'}"
    yield ""
    yield f"weightlora chose where the adapter is: {_summary(plan)}. PEFT loads it without weightlora."
    if rounded:
        yield (
            "It was trained on weights from a GGUF file, which rounds them. With the base model's own weights its "
            "outputs differ a little."
        )
    yield ""


def _loading(task: str, base: str, tokenizer: str, labels: Sequence[str]) -> Iterator[str]:
    """A block of Python that loads the adapter with PEFT and transformers."""
    yield from ("## Load it", "", "```python")
    loader = _LOADERS.get(task) if base else None
    if loader is None:
        yield "from peft import PeftModel"
        yield ""
        yield "base_model = ...  # the model that was trained, as it was loaded then"
        yield 'model = PeftModel.from_pretrained(base_model, ".")  # this folder, or its name on the hub'
    else:
        given = "adapter"
        yield from ("import torch", f"from peft import {loader}", "from transformers import AutoTokenizer", "")
        yield 'adapter = "."  # this folder, or its name on the hub'
        if labels:
            yield f"labels = {list(labels)!r}"
            yield "label2id = {name: number for number, name in enumerate(labels)}"
            given = "adapter, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label2id"
        yield f"model = {loader}.from_pretrained({given}).eval()"
        yield f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})"
        yield ""
        yield 'inputs = tokenizer("a text", return_tensors="pt")'
        yield "with torch.no_grad():"
        answer = "model(**inputs)" if task == "SEQ_CLS" and not labels else _ANSWERS.get(task, "model(**inputs)")
        yield f"    print({answer})"
    yield from ("```", "")


def _selection(plan: PlanData, *, drawn: bool) -> Iterator[str]:
    yield from ("## Selection", "", f"Rule `{in_code(plan.rule)}`, seed {plan.seed}: {_summary(plan)}.", "")
    if drawn:
        yield from (f"![Heat map of the scores by layer and projection. {_summary(plan)}.]({PICTURE_FILE})", "")
    yield from _table(plan)


def _measured(metrics: Mapping[str, float]) -> Iterator[str]:
    if metrics:
        yield from ("", "## Metrics", "", "| metric | value |", "| --- | --- |")
        yield from (f"| {in_markdown(name)} | {value:.4g} |" for name, value in metrics.items())


def _summary(plan: PlanData) -> str:
    return (
        f"{len(plan.names)} of {len(plan.entries)} sites, {plan.parameters:,} adapter parameters "
        f"(LoRA on all: {plan.lora_parameters:,})"
    )


def _drawn(plan: PlanData, path: Path) -> bool:
    try:
        draw_heatmap(plan, path)
    except MissingPackageError:  # training needs no matplotlib
        return False
    return True


def _table(plan: PlanData) -> Iterator[str]:
    yield from ("| projection | sites kept | rank | layers |", "| --- | --- | --- | --- |")
    for projection in ordered_projections(entry.site.projection for entry in plan.entries):
        sites = [entry for entry in plan.entries if entry.site.projection == projection]
        kept = [entry for entry in sites if entry.r > 0]
        ranks = ", ".join(str(r) for r in sorted({entry.r for entry in kept})) or "–"
        numbers = {entry.site.block.rpartition(".")[2] for entry in kept if entry.site.block}
        layers = " ".join(sorted(numbers, key=lambda number: (len(number), number))) or "–"
        yield f"| {in_markdown(projection)} | {len(kept)} of {len(sites)} | {ranks} | {layers} |"
