"""A recipe: model, task, method and training arguments in one flat YAML file, overridden from the command line.

Training arguments keep transformers' own names; ours are the fields of the three classes below.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from weightlora.errors import OptionError
from weightlora.files import read_mapping
from weightlora.methods import entry_of, make_method, options_of
from weightlora.plan.limits import LIMITS, Limits, read_limits
from weightlora.runs._parsers import (
    Parser,
    actions_of,
    check_training,
    option_name,
    read_training,
    training_names,
    training_parser,
)
from weightlora.selection.rules import RULES, rule_entry, rule_of
from weightlora.selection.steps import check_steps
from weightlora.text import closest
from weightlora.validation import Count, Natural, NotNegative, Share, Text, check_fields, read_pairs

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from weightlora.selection.rules.base import Rule


#: More than any layer is wide.
Rank = Annotated[int, Field(ge=1, le=65_536)]
#: The learning rate where a recipe names none. Transformers' 5e-5 suits whole models: at it adapters hardly move.
ADAPTER_RATE = 1e-3
#: Losses are logged after this share of the steps: at least ten times in ten steps or more.
_LOGGED = 0.05


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelOptions:
    """The base model."""

    model_name_or_path: Text = _option("embedded/minilm", "hub name, folder, embedded/minilm or embedded/smollm2")
    model_revision: Text = _option("main", "branch, tag or commit on the hub")
    gguf_file: Text | None = _option(None, "a GGUF file in that folder")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "auto, float32, bfloat16 or float16: how the base is loaded"
    )
    attn_implementation: Text | None = _option(
        None, "eager, sdpa, flash_attention_2 or another of transformers; default: the model's own"
    )
    load_in_8bit: bool = _option(False, "quantise the base to 8 bit with bitsandbytes")
    load_in_4bit: bool = _option(False, "quantise the base to 4 bit (NF4) with bitsandbytes")
    trust_remote_code: bool = _option(False, "run code that comes with the model")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.load_in_8bit and self.load_in_4bit:
            raise OptionError("load_in_8bit and load_in_4bit exclude each other; give one")


@dataclass
class TaskOptions:
    """The rows, and how they become tokens."""

    task: Text = _option("rotten_tomatoes", "name of a task; `weightlora methods --tasks` lists them")
    dataset_name: Text | None = _option(None, "hub name or folder, instead of the task's own")
    dataset_config_name: Text | None = _option(None, "configuration of the data set; of a generator: setting=value ...")
    train_file: Text | None = _option(None, ".csv, .json, .jsonl or .parquet, instead of dataset_name")
    validation_file: Text | None = _option(None, "rows that are measured")
    columns: list[Text] = field(default_factory=list[str], metadata={"help": "role=column, where yours differ"})
    max_train_samples: Count | None = _option(None, "only so many rows to train on")
    max_eval_samples: Count | None = _option(None, "only so many rows a measured split")
    held_out_samples: Natural = _option(0, "training rows set aside and measured, to choose options on")
    max_seq_length: Count = _option(128, "tokens of a row or source text")
    max_target_length: Count = _option(128, "tokens of a summary or generated answer")
    doc_stride: Natural = _option(128, "tokens that pieces of a long context share")
    num_beams: Count = _option(1, "beams of a generated summary")
    teacher_forced: bool = _option(
        False, "measure loss and exact match of the given answers in one forward pass; generate none"
    )
    harness_path: Text | None = _option(None, "folder of your own lm-evaluation-harness tasks")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.validation_file is not None and self.train_file is None:
            raise OptionError(f"validation_file={self.validation_file!r} needs a train_file; give both")
        for name in ("dataset_name", "dataset_config_name"):
            if self.train_file is not None and getattr(self, name) is not None:
                raise OptionError(f"train_file and {name}={getattr(self, name)!r} exclude each other; leave one out")


@dataclass
class MethodOptions:
    """The method and its limits."""

    method: Text = _option("selected", "name of a method; `weightlora methods` lists them")
    plan: Text | None = _option(None, "a plan.json to train, instead of a method")
    adapters: Text | None = _option(
        None, "at most so many adapters at the rank of LoRA, or this share of them; default without a limit: 0.5"
    )
    parameters: Text | None = _option(
        None, "at most so many adapter parameters, or this share of LoRA's; ranks are free"
    )
    time: Text | None = _option(
        None,
        "at most this share of LoRA's time, such as 0.6: of its steps, with a rule of its step time, "
        "with a store of the whole run",
    )
    memory: Text | None = _option(
        None, "at most this peak of the device, such as 8GB: fewer rows at once; with a rule, fewer layers"
    )
    rule: Text | None = _option(
        None,
        "how sites are scored; default: first_order, or nothing is scored within parameters, time or memory; there are "
        f"{', '.join(entry.name for entry in RULES)}, or package.module:Class of your own",
    )
    ranking: Literal["score", "spread"] | None = _option(
        None,
        "how sites compete: by score, or within each part of the depth (spread); default: spread for first_order, "
        "score for other rules and for limits on memory or step time",
    )
    rule_options: list[Text] = field(
        default_factory=list[str], metadata={"help": "settings of the rule, as name=value: head_steps=0 gate_lr=5.0"}
    )
    steps: Text | None = _option(
        None,
        "T, steps that score sites, or auto; default: at most 3 % of all; with a rule 0.5 %, at least as it needs",
    )
    method_options: list[Text] = field(
        default_factory=list[str], metadata={"help": "settings of the method, as name=value"}
    )
    lora_r: Rank = _option(8, "rank of plain LoRA")
    lora_alpha: Count = _option(16, "lora_alpha of plain LoRA")
    lora_dropout: Share = _option(0.0, "dropout of the adapters")
    lora_target_modules: list[Text] = field(
        default_factory=list[str], metadata={"help": "default: every linear layer but head and pooler"}
    )
    lora_modules_to_save: list[Text] = field(
        default_factory=list[str], metadata={"help": "modules to train whole, in addition to the task's head"}
    )
    head_learning_rate: NotNegative | None = _option(
        None, "of modules trained whole, such as a head; default: learning_rate"
    )
    use_rslora: bool = _option(False, "scale by alpha/√r")
    use_dora: bool = _option(False, "train DoRA on the chosen sites")
    fast: Literal["input", "rank"] | None = _option(
        None,
        "the fast LoRA step; its dropout acts on the input, as PEFT's does, or on lora_A's output (rank)",
        nargs="?",
        const="input",
    )
    store_frozen: Text | None = _option(
        None,
        "compute what lies below the lowest adapter once and read it back in later epochs: memory, or a folder for it",
        nargs="?",
        const="memory",
    )
    store_limit: Text | None = _option(None, "the most that is stored, such as 20GB; default: all rows")
    store_dropout: Literal["off below"] | None = _option(
        None, "for models with dropout below the lowest adapter: run these blocks as in evaluation"
    )
    store_offload: bool = _option(
        False, "after the first epoch the weights below the lowest adapter leave the device; for evaluation they return"
    )
    grow_batch: bool = _option(False, "train larger batches with less accumulation, within the memory of plain LoRA")

    def __post_init__(self) -> None:
        check_fields(self)
        entry_of(self.method)  # names and numbers that need no import; the rest is checked when the method is made
        if self.rule is not None:
            rule_entry(self.rule)
        elif self.rule_options:
            raise OptionError(f"rule_options={self.rule_options} need a rule; give rule, too")
        for name in ("store_limit", "store_dropout"):
            if getattr(self, name) is not None and self.store_frozen is None:
                raise OptionError(f"{name}={getattr(self, name)!r} needs store_frozen; give it, too")
        if self.store_offload and self.store_frozen is None:
            raise OptionError("store_offload needs store_frozen; give it, too")
        if self.store_limit is not None:
            Limits(memory=self.store_limit)
        read_limits(vars(self))
        if self.steps is not None and self.plan is None:  # beside a plan they are those of a study
            check_steps(self.steps)

    @property
    def scored_by(self) -> Rule | None:
        """The rule with its settings; None where none is named.

        Raises:
            OptionError: It is unknown, or a setting is unknown or out of its range.
        """
        return None if self.rule is None else rule_of(self.rule, **read_pairs("rule_options", self.rule_options))

    @property
    def given(self) -> dict[str, Any]:
        """What the method is built with, checked: limits, ``rule`` and ``steps`` where it has them, and its own.

        Raises:
            OptionError: An option is unknown or out of its range.
        """
        entry, steps = entry_of(self.method), None if self.steps is None else check_steps(self.steps)
        if entry.begins_training and self.rule not in (None, "paper"):
            raise OptionError(
                f"rule={self.rule!r}: method {self.method} is the paper's; give method selected for another rule"
            )
        scoring = {"rule": self.scored_by, "steps": steps, "ranking": self.ranking}
        known, limits = options_of(self.method), read_limits(vars(self))
        taken = [name for name in LIMITS if name in known]
        for name in limits if taken else ():
            if name not in known:
                allowed = " and ".join(taken)
                raise OptionError(f"{name}={limits[name]!r}: method {self.method} is limited by {allowed}; give these")
        own = read_pairs("method_options", self.method_options)
        if self.head_learning_rate is not None and "head_learning_rate" in known:
            own = {"head_learning_rate": self.head_learning_rate, **own}
        for name in ("fast", "lora", "loss_fn"):  # the recipe's and the task's
            if name in own:
                raise OptionError(f"method_options: {name} is no setting of a method; leave it out")
        limits = {name: limits[name] for name in taken if name in limits}
        scoring = {name: value for name, value in scoring.items() if name in known} if entry.reuses_plan else {}
        return {**limits, **scoring, **own}


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs."""

    model: ModelOptions
    task: TaskOptions
    method: MethodOptions
    training: TrainingArguments
    settings: Mapping[str, Any]
    """The effective options as YAML can hold them: all of ours, and the training's that are not the default."""
    given: frozenset[str] = frozenset()
    """The options that the file or the command line names; the others are defaults."""

    @property
    def output_dir(self) -> Path:
        """Where everything of the run is written."""
        return Path(str(self.training.output_dir))


def read_recipe(
    config: str | Path | Mapping[str, Any] | None = None, words: Sequence[str] = (), *, output_dir: str = "runs/train"
) -> Recipe:
    """Return the recipe of a YAML file under the options of the command line, all checked.

    Args:
        config: A YAML file of ``option: value`` lines, or what is in one; None where there is none.
        words: ``["--learning_rate", "1e-3", ...]``; they win over the file.
        output_dir: Where neither says so.

    Raises:
        DataError: The file is not readable as such lines.
        OptionError: An option is unknown (the text names the closest), or has a value it cannot have.

    Example:
        >>> recipe = read_recipe(words=["--task", "rte", "--adapters", "18", "--learning_rate", "1e-3"])
        >>> recipe.task.task, recipe.method.adapters, recipe.training.learning_rate
        ('rte', '18', 0.001)
    """
    from weightlora.tasks import find_task, kind_of

    where = f"{config}: " if isinstance(config, str | Path) else ""
    content = read_mapping(config) if isinstance(config, str | Path) else config or {}
    # Ours first: the task decides which training arguments there are. TRL's have a trust_remote_code too, for models
    # that it loads itself; ours is the one that counts.
    ours = Parser(ModelOptions, TaskOptions, MethodOptions)
    (model, rows, method), rest = ours.read([*option_words(content), *words])
    task = find_task(rows.task)
    own = set(actions_of(ours))
    names = training_names(task.kind)
    if names:  # mistyped names are found before the seconds that the classes' import takes
        typed = [word for word in rest if word.startswith("--") and option_name(word).removeprefix("no_") not in names]
        _require_known(where, content, typed, own | names)
    defaults: dict[str, Any] = {"output_dir": output_dir, "logging_steps": _LOGGED}
    if method.method != "full":
        defaults["learning_rate"] = ADAPTER_RATE
    theirs = training_parser(kind_of(task).arguments_class(), defaults)
    known = {**actions_of(ours), **actions_of(theirs)}
    lists = {name for name, action in known.items() if action.nargs in ("*", "+")}
    for key, value in content.items():
        if key == "report_to" and value == []:  # what transformers makes of "none", as in a run's config.yaml
            continue
        words_only = isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value)
        if (isinstance(value, list) and not (key in lists and words_only)) or (isinstance(value, dict) and key in own):
            allowed = "a list of words" if key in lists else "one value"
            raise OptionError(f"{where}{key}={value!r:.80} is not allowed: give {allowed}")
    training, rest = read_training(theirs, rest)
    check_training(training)
    _require_known(where, content, rest, known)
    if method.plan is None:  # mistakes are found before anything is loaded
        make_method(method.method, **method.given)
    settings = _settings((model, rows, method), training)
    if training.device.type == "cpu":  # there is nothing to pin memory for, and each loader would warn of it
        training.dataloader_pin_memory = False
    given = {str(key) for key, value in content.items() if value not in (None, [])}
    given |= {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return Recipe(model, rows, method, training, settings, frozenset(given))


def named_options(content: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the checked values of the options that ``words`` give, where ``content`` is the recipe under them.

    Raises:
        OptionError: An option is unknown, or has a value it cannot have.

    Example:
        >>> named_options({"adapters": 18}, ["--seed", "3"])
        {'seed': 3}
    """
    names = [option_name(word) for word in words if word.startswith("--")]
    recipe = read_recipe(content, words)
    parts = (recipe.model, recipe.task, recipe.method, recipe.training)
    values = {f.name: getattr(part, f.name) for part in reversed(parts) for f in dataclasses.fields(part)}
    return {name: _plain(values[name]) for name in names}


def _require_known(where: str, content: Mapping[str, Any], words: Sequence[str], known: Collection[str]) -> None:
    """Raise where the file has an option that is not known, or where words are left that are none."""
    for key in content:
        if key not in known:
            raise OptionError(f"{where}unknown option {key!r}{closest(str(key), known)}")
    if words:
        raise OptionError(f"unknown option {words[0]!r}{closest(option_name(words[0]), known)}")


def _settings(ours: Sequence[Any], training: Any) -> dict[str, Any]:
    # Named in any case: the default is ours, or depends on the machine.
    names = ("output_dir", "use_cpu", "bf16", "fp16", "learning_rate", "logging_steps")
    named = {name: getattr(training, name) for name in names}
    # Now or never: making training arguments resets accelerate's state, which a trainer made before relies on.
    default = type(training)(**named)
    if training.deepspeed_plugin is not None:  # from_pretrained asks for the last one made, and the default's is gone
        training.deepspeed_plugin.set_deepspeed_weakref()
    theirs = {
        f.name: _plain(getattr(training, f.name))
        for f in dataclasses.fields(training)
        if f.init and _plain(getattr(training, f.name)) != _plain(getattr(default, f.name))
    }
    return {**{k: v for part in ours for k, v in dataclasses.asdict(part).items()}, **named, **theirs}


def option_words(content: Mapping[str, Any]) -> list[str]:
    """Return the options of a YAML mapping as the words of a command line.

    Raises:
        OptionError: A mapping in it cannot be JSON: it holds a date, for instance.

    Example:
        >>> option_words({"time": 0.5, "method_options": ["init_r=12"], "plan": None})
        ['--time=0.5', '--method_options', 'init_r=12']
    """
    words: list[str] = []
    for key, value in content.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            words += [f"--{key}", _as_json(key, value)]
        elif value is not None:
            words += [f"--{key}={value}"]
    return words


def _as_json(key: str, value: Mapping[str, Any]) -> str:
    """A mapping as transformers reads it from the command line."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:  # a date, bytes, or a mapping that holds itself
        raise OptionError(f"{key}={value!r:.80} is not allowed: {error}; give numbers, and texts in quotes") from error


def _plain(value: Any) -> Any:
    """The value as YAML can hold it."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str, dict)) else str(value)
