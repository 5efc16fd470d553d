"""A recipe → its trainer: rows, tokenizer, base model, and plain LoRA on all candidates.

In a recipe with ``plan``, what the plan decides is its own, and an option that says something else is a mistake.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, MissingPackageError, OptionError, SiteError, WeightLoraError, require_extra
from weightlora.methods import METHODS
from weightlora.model.layers import unchecked_patterns
from weightlora.model.sites import TASK_HEADS, find_sites
from weightlora.plan.limits import LIMITS, read_limits
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.runs.recipe import MethodOptions, Recipe, TaskOptions
from weightlora.selection.rules import RULES, rule_of, settings_of
from weightlora.selection.steps import check_steps
from weightlora.tasks import find_task, kind_of, load_model
from weightlora.tasks.base import PreparedTask, RowOptions, Task
from weightlora.tasks.embedded import embedded_model
from weightlora.tasks.pretrained import load_tokenizer
from weightlora.tasks.rows import Source, load_rows, with_columns
from weightlora.text import closest
from weightlora.validation import read_pairs

if TYPE_CHECKING:
    from datasets import DatasetDict
    from torch import nn
    from transformers import Trainer, TrainerCallback

#: Options that act on the training of a plan; the plan decides the others of a method.
_FREE = (
    *("plan", "head_learning_rate", "fast", "grow_batch", "lora_target_modules"),
    *("store_frozen", "store_limit", "store_dropout", "store_offload"),
)


def make_trainer(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    measured: bool = True,
    few: int | None = None,
    adapter: Path | None = None,
) -> tuple[PreparedTask, Trainer, Mapping[str, int]]:
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


# -- a recipe with a plan ----------------------------------------------------------------------------------------------


def with_plan(recipe: Recipe) -> Recipe:
    """Return the recipe with the values of its plan; one without a plan is returned as it is.

    Raises:
        OptionError: An option that was given has another value than the plan.
        PlanError: The plan cannot be read.
    """
    options = recipe.method
    if options.plan is None:
        return recipe
    plan = AdapterPlan.load(options.plan)
    named = (options.rule or "") if "rule" in recipe.given else ""
    there, now = _planned(plan, named), _asked(options, recipe.given, plan)
    pairs = read_pairs("method_options", options.method_options)
    now |= pairs
    changed = [k for k in now if (k in there or k in pairs) and json.dumps(there.get(k)) != json.dumps(now[k])]
    if changed:
        faults = "; ".join(f"{name}={there.get(name)!r:.60} there, {now[name]!r:.60} now" for name in changed)
        raise OptionError(
            f"{options.plan} decides the adapters, and was made with other options ({faults}); leave these out, or "
            "leave plan out to select anew"
        )
    own = {name: there.get(name) for name in _names() if name in there or name not in recipe.given}
    own |= {name: str(own[name]) for name in (*LIMITS, "steps") if own.get(name) is not None}
    own |= {name: [] for name in ("rule_options", "method_options") if own.get(name, []) is None}
    # Several ranks, or an alpha that is not whole, have no option.
    own |= {name: None for name in ("lora_r", "lora_alpha") if name in own and type(own[name]) is not int}
    known = {name: value for name, value in own.items() if value is not None}
    return replace(recipe, method=replace(options, **known), settings={**recipe.settings, **own})


def require_candidates(options: MethodOptions, plan: AdapterPlan, model: nn.Module) -> None:
    """Raise where ``lora_target_modules`` names other candidates than the plan has.

    Args:
        options: The recipe's.
        plan: Its plan.
        model: With LoRA on what the options name.

    Raises:
        OptionError: It does.
    """
    from weightlora.model.layers import lora_layers

    named, planned = set(lora_layers(model)), set(plan.ranks)
    if options.lora_target_modules and named != planned:
        one = min(named ^ planned)
        raise OptionError(
            f"lora_target_modules={options.lora_target_modules} are not the candidates of {options.plan}, {one} among "
            f"the {len(named ^ planned)} that differ; leave lora_target_modules out, or leave plan out to select anew"
        )


def _names() -> list[str]:
    return [each.name for each in dataclasses.fields(MethodOptions) if each.name not in _FREE]


def _planned(plan: AdapterPlan, named: str) -> dict[str, Any]:
    """What the plan was made with, as far as it records it: by option, or by setting of its rule.

    A rule of the user's own is imported only where the recipe names it: a plan may come from elsewhere.
    """
    ranks, alphas = {entry.lora_r for entry in plan.entries}, {entry.lora_alpha for entry in plan.entries}
    made: dict[str, Any] = {
        **plan.options,
        "seed": plan.seed,
        "lora_r": ranks.pop() if len(ranks) == 1 else sorted(ranks),
        "lora_alpha": alphas.pop() if len(alphas) == 1 else sorted(alphas),
        "lora_dropout": float(plan.lora.get("lora_dropout", 0.0)),
        "lora_modules_to_save": list(plan.lora.get("modules_to_save", [])),
        "use_rslora": bool(plan.lora.get("use_rslora", False)),
        "use_dora": bool(plan.lora.get("use_dora", False)),
    }
    if _is_ours(plan) or ":" in plan.rule:
        default = settings_of(rule_of(plan.rule)) if _is_ours(plan) or plan.rule == named else {}
        own = [name for name in default if plan.options.get(name, default[name]) != default[name]]
        made |= {"rule": plan.rule, "ranking": plan.options.get("ranking", "score")}
        made |= {"method": _method_of(plan)}
        made |= {"rule_options": [f"{name}={plan.options[name]}" for name in own]}
        made |= {"warm_start": plan.options.get("warm_start", False), "budget": plan.options.get("expand", "ranks")}
    elif any(plan.rule == entry.name for entry in METHODS):
        made |= {"method": plan.rule}
    return made


def _asked(options: MethodOptions, given: frozenset[str], plan: AdapterPlan) -> dict[str, Any]:
    """The same of the options that were given."""
    asked = {name: getattr(options, name) for name in _names() if name in given}
    asked |= {name: value for name, value in read_limits(vars(options)).items() if name in given}
    asked |= {"steps": check_steps(asked["steps"])} if "steps" in given else {}
    asked |= {"lora_dropout": float(options.lora_dropout)} if "lora_dropout" in given else {}
    if {"rule", "rule_options"} & given and (_is_ours(plan) or ":" in plan.rule):
        asked |= _rule_asked(plan.rule if options.rule is None else options.rule, options.rule_options)
    return {name: value for name, value in asked.items() if name not in ("rule_options", "method_options")}


def _method_of(plan: AdapterPlan) -> str:
    if "expand" in plan.options:
        return "weightlora_plus"
    return "weightlora" if plan.options.get("begins_training") else "selected"


def _is_ours(plan: AdapterPlan) -> bool:
    """Whether the plan's rule has a line in the registry."""
    return any(plan.rule == entry.name for entry in RULES)


def _rule_asked(name: str, texts: list[str]) -> Mapping[str, Any]:
    rule = rule_of(name, **read_pairs("rule_options", texts))
    return {"rule": rule.name, **{k: v for k, v in settings_of(rule).items() if v is not None}}
