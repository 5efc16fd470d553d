"""A plan in the configuration of another training stack.

Where the stack's options cannot express the plan, it continues from an adapter directory: A random from the plan's seed
and B = 0, as PEFT initialises them, with PEFT's configuration.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError, StackError
from weightlora.files import write_json, write_text
from weightlora.folders import whole_folder
from weightlora.model.sites import TASK_HEADS
from weightlora.plan.plan import ADAPTER_FILES
from weightlora.serving.adapter import matrix_name
from weightlora.stacks import Fields, stack_of

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan

#: The folder of an adapter inside the output.
_ADAPTER = "adapter"
#: Fields that choose sites, which a plan has already done.
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
#: Fields that decide no number of a new adapter, or are its size.
_PLAIN = (
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"),
    *("lora_dropout", "use_rslora", "task_type", "fan_in_fan_out"),
)


def emit(plan: AdapterPlan, stack: str, output_dir: str | Path | None = None) -> str:
    """Return ``plan`` in the configuration of a training stack: exactly its sites, ranks and alphas.

    Args:
        plan: From :func:`weightlora.select` or :meth:`weightlora.AdapterPlan.load`.
        stack: ``"peft"``, ``"peft-benchmark"``, ``"trl"``, ``"axolotl"``, ``"llamafactory"``, ``"swift"``,
            ``"unsloth"``, ``"torchtune"`` or ``"litgpt"``.
        output_dir: A new folder for the file and, where the stack's options cannot express the plan, the adapter
            directory that it continues from. What an earlier call wrote is replaced; after an error it is as it was.

    Raises:
        OptionError: There is no such stack, or an adapter directory is needed and ``output_dir`` is None.
        StackError: The stack cannot train this plan.
        PlanError: The plan keeps no site.
        OutputError: The folder holds other files, or cannot be written.

    Example:
        >>> from weightlora import AdapterPlan
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import PlannedSite
        >>> plan = AdapterPlan((
        ...     PlannedSite(Site("h.0.q", 8, 8), 4, 8, r=4, alpha=8, score=2.0),
        ...     PlannedSite(Site("h.1.q", 8, 8), 4, 8, r=0, alpha=8, score=1.0),
        ... ))
        >>> print(emit(plan, "llamafactory"), end="")
        # Put these lines into your configuration: llamafactory-cli train yours.yaml
        finetuning_type: lora
        lora_rank: 4
        lora_alpha: 8
        lora_dropout: 0.0
        lora_target: h.0.q
    """
    own, fields = stack_of(stack), _planned_fields(plan)
    lacking = own.lacking(plan, fields)
    if lacking is None:
        written = own.write(own, fields)
    else:
        reason = f"{own.title} {own.version} {lacking}"
        if own.continuation is None:
            raise StackError(f"{reason}; use a stack that loads PEFT adapters, such as axolotl")
        if output_dir is None:
            raise OptionError(f"{reason}; give --output_dir for a folder with an adapter that it continues from")
        _require_plain(fields, reason)
        written = own.yaml(own.continuation(str(Path(output_dir) / _ADAPTER)))
    if output_dir is not None:
        with whole_folder(output_dir, "weightlora emit") as draft:
            write_text(draft / written.file, written.text)
            for name, text in ({} if own.besides is None else own.besides(plan)).items():
                write_text(draft / name, text)
            if lacking is not None:
                _write_adapter(draft / _ADAPTER, plan, fields)
    return written.text


def _planned_fields(plan: AdapterPlan) -> dict[str, Any]:
    """Return the arguments of ``LoraConfig`` that give exactly the planned adapters, as JSON.

    ``target_modules`` is the sorted list of full names, or a regular expression of them where PEFT, which reads listed
    names as endings, would match other modules too.

    Raises:
        PlanError: The plan keeps no site, or this PEFT does not take its fields.
    """
    config = plan.to_lora_config()
    ambiguous = bool(config.exclude_modules) or config.layers_to_transform is not None
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": "|".join(map(re.escape, plan.names)) if ambiguous else list(plan.names),
        **{name: pattern for name, pattern in patterns.items() if pattern},
        **{name: value for name, value in plan.lora.items() if name not in _CHOOSING},
    }


def _require_plain(fields: Fields, reason: str) -> None:
    """Raise where a new adapter depends on the base weights, or holds some of them."""
    others = [f"{name}={value!r:.40}" for name, value in fields.items() if name not in _PLAIN]
    if fields.get("task_type") in TASK_HEADS:  # PEFT trains and saves the head whole
        others.append(f"task_type={fields['task_type']!r}")
    if others:
        raise StackError(
            f"{reason}, and a new adapter with {', '.join(others)} needs the base model; write it in Python: "
            "plan.attach(model).save_pretrained(folder)"
        )


def _write_adapter(folder: Path, plan: AdapterPlan, fields: Fields) -> None:
    """Write a new adapter; its configuration has only fields that old versions of PEFT have too."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(plan.seed)
    tensors: dict[str, torch.Tensor] = {}
    for site, r in ((entry.site, entry.r) for entry in plan.entries if entry.r > 0):
        bound = 1 / math.sqrt(site.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT
        uniform = torch.rand(r, site.in_features, generator=generator)
        tensors[matrix_name(site.name, "A")] = (2 * uniform - 1) * bound
        tensors[matrix_name(site.name, "B")] = torch.zeros(site.out_features, r)
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": plan.base_model, "task_type": None, **fields}
    write_json(folder / ADAPTER_FILES[0], config)
    try:
        save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(str(error)) from error
    plan.save(folder / "plan.json")
