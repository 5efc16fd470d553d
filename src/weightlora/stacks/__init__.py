"""Training stacks that a plan can be written for; a new one is an entry of :data:`STACKS`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from weightlora.errors import OptionError
from weightlora.serving.adapter import is_here, read_base
from weightlora.text import closest

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan

Fields = Mapping[str, Any]
"""Arguments of PEFT's ``LoraConfig`` by name, as JSON: those of the plan, and the user's own."""


@dataclass(frozen=True)
class Written:
    """A small file in a stack's own format."""

    file: str
    """Its name."""
    text: str


@dataclass(frozen=True)
class Stack:
    """How plans are written for a training stack."""

    name: str
    """What users type."""
    title: str
    """Its own name."""
    version: str
    """The version that the output is checked against."""
    write: Callable[[Stack, Fields], Written]
    """Makes the configuration of a plan of which nothing is lacking."""
    use: str = ""
    """How a YAML file is used, for its first line."""
    options: Mapping[str, str] | None = None
    """Its options by the field, in the order of the file; an empty text where it sets the field by itself. None: it
    takes every field."""
    whole_alpha: bool = False
    """Whether its ``lora_alpha`` is a whole number."""
    patterns: bool = False
    """Whether ``target_modules`` may be a regular expression."""
    limits: Callable[[AdapterPlan], str | None] | None = None
    """What else it cannot express, as the end of a sentence that begins with its name; None where it can."""
    besides: Callable[[AdapterPlan], Mapping[str, str]] | None = None
    """Makes further files of its folder, their texts by their names; None: there are none."""
    continuation: Callable[[str], Mapping[str, Any]] | None = None
    """The options that continue from an adapter directory; None where the stack cannot."""

    def lacking(self, plan: AdapterPlan, fields: Fields) -> str | None:
        """Return what it cannot express of a plan, as the end of a sentence that begins with its name, or None.

        Args:
            plan: The plan.
            fields: Its fields.
        """
        return (self.limits(plan) if self.limits else None) or self.lacking_option(fields)

    def lacking_option(self, fields: Fields) -> str | None:
        """Return what it has no option for, or None."""
        if self.options is None:
            return None
        for name, word in (("rank_pattern", "rank"), ("alpha_pattern", "lora_alpha")):
            if name in fields and name not in self.options:
                values = fields[name].values()
                return f"has one {word} for all adapters, and the plan has {min(values):g} to {max(values):g}"
        alphas = (fields["lora_alpha"], *fields.get("alpha_pattern", {}).values())
        if self.whole_alpha and any(alpha != int(alpha) for alpha in alphas):
            return f"reads whole numbers as lora_alpha, and the plan has {next(a for a in alphas if a != int(a)):g}"
        if isinstance(fields["target_modules"], str) and not self.patterns:
            return "reads names as endings, and those of the plan are also endings of sites that it does not keep"
        others = [f"{name}={value!r:.40}" for name, value in fields.items() if name not in self.options]
        return f"has no option for {', '.join(others)}" if others else None

    def renamed(self, fields: Fields) -> dict[str, Any]:
        """Return its options, each with the value of its field where the plan has one; the dropout is always there."""
        own, values = self.options or {}, {"lora_dropout": 0.0, **fields}
        return {option: values[name] for name, option in own.items() if option and name in values}

    def yaml(self, options: Mapping[str, Any]) -> Written:
        """Return ``options`` as its YAML file, below a comment that says how it is used."""
        return Written(
            f"{self.name}.yaml", f"# {self.use}\n" + yaml.safe_dump({**options}, sort_keys=False, width=10**6)
        )


# -- PEFT, TRL and Unsloth: Python -------------------------------------------------------------------------------------


def _arguments(fields: Fields) -> str:
    """Return ``fields`` as arguments of a Python call, one a line, and the names in lists and dictionaries too.

    Example:
        >>> print(_arguments({"r": 8, "target_modules": ["a.q", "a.v"]}), end="")
            r=8,
            target_modules=[
                'a.q',
                'a.v',
            ],
    """
    lines: list[str] = []
    for name, value in fields.items():
        if isinstance(value, list):
            items, (start, end) = [repr(item) for item in value], "[]"
        elif isinstance(value, Mapping):
            items, (start, end) = [f"{key!r}: {item!r}" for key, item in value.items()], "{}"
        else:
            lines.append(f"    {name}={value!r},\n")
            continue
        lines += [f"    {name}={start}\n", *(f"        {item},\n" for item in items), f"    {end},\n"]
    return "".join(lines)


def _peft_config(stack: Stack, fields: Fields, use: str) -> Written:
    code = f"# {use}\nfrom peft import LoraConfig\n\npeft_config = LoraConfig(\n{_arguments(fields)})\n"
    return Written(f"{stack.name}.py", code)


def _peft(stack: Stack, fields: Fields) -> Written:
    return _peft_config(stack, fields, "Use: model = peft.get_peft_model(model, peft_config)")


def _benchmark(_stack: Stack, fields: Fields) -> Written:
    """An experiment of PEFT's ``method_comparison/MetaMathQA``: its run.py reads the folder."""
    return Written("adapter_config.json", _json({"peft_type": "LORA", "bias": "none", **fields}))


def _benchmark_training(plan: AdapterPlan) -> Mapping[str, str]:
    """What differs from the benchmark's own training parameters: the model, the plan's rate and number of steps."""
    rate = {"lr": _BENCHMARK_RATE * plan.learning_rate_factor, "weight_decay": _BENCHMARK_DECAY}
    own: dict[str, Any] = {} if plan.base_model is None else {"model_id": plan.base_model}
    own |= {} if plan.learning_rate_factor == 1 else {"optimizer_kwargs": rate}
    own |= {} if plan.step_share == 1 else {"max_steps": plan.steps_of(_BENCHMARK_STEPS)}
    return {"training_params.json": _json(own)} if own else {}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


#: AdamW's, and the steps, in PEFT's default_training_params.json.
_BENCHMARK_RATE, _BENCHMARK_DECAY, _BENCHMARK_STEPS = 1e-4, 0.1, 5000


def _trl(stack: Stack, fields: Fields) -> Written:
    """Options of its command line, or Python code where these cannot express the plan."""
    reason = _TRL_COMMAND.lacking_option(fields)
    if reason is not None:
        use = f"TRL's command line {reason}. In Python: SFTTrainer(..., peft_config=peft_config)"
        return _peft_config(stack, fields, use)
    return _trl_command(_TRL_COMMAND, fields)


def _trl_command(stack: Stack, fields: Fields) -> Written:
    options: dict[str, Any] = {"use_peft": True, **stack.renamed(fields)}
    names = options["lora_target_modules"]
    if isinstance(names, str) or len(names) == 1:  # TRL reads a list of one as a regular expression
        options["lora_target_modules"] = [names if isinstance(names, str) else re.escape(names[0])]
    return stack.yaml(options)


def _unsloth(stack: Stack, fields: Fields) -> Written:
    """A call of ``get_peft_model``, which gives further arguments to PEFT's ``LoraConfig``."""
    own = {name: value for name, value in fields.items() if name != "task_type"}  # by the class of the model
    call = f"model = FastLanguageModel.get_peft_model(\n    model,\n{_arguments(own)})\n"
    use = "# model, tokenizer = FastLanguageModel.from_pretrained(yours)"
    return Written(f"{stack.name}.py", f"from unsloth import FastLanguageModel\n\n{use}\n{call}")


# -- Axolotl, LLaMA-Factory and ms-swift: YAML, or an adapter directory ------------------------------------------------


def _axolotl(stack: Stack, fields: Fields) -> Written:
    return stack.yaml({"adapter": "lora", **stack.renamed(fields), "lora_target_linear": False})


def _llamafactory(stack: Stack, fields: Fields) -> Written:
    options = {"finetuning_type": "lora", **stack.renamed(fields)}
    joined = {name: ",".join(value) for name, value in options.items() if isinstance(value, list)}
    return stack.yaml({**options, **joined})


def _llamafactory_limits(plan: AdapterPlan) -> str | None:
    if plan.lora.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        return f"trains with task_type='CAUSAL_LM', and the plan has {plan.lora['task_type']!r:.40}"
    dropped = [entry.site.name for entry in plan.entries if entry.r == 0]
    inside = [name for name in plan.names if any(name in other for other in dropped)]
    if inside:  # in a model with a vision tower, a name is matched anywhere in another
        return f"reads names as parts of names, and {inside[0]} is a part of one that the plan does not keep"
    return None


def _swift(stack: Stack, fields: Fields) -> Written:
    options = {"tuner_type": "lora", **stack.renamed(fields)}
    if isinstance(options["target_modules"], str):
        options["target_regex"] = options.pop("target_modules")
    return stack.yaml(options)


# -- torchtune and LitGPT: types of projections, each in all layers or in none, all with one rank ----------------------

_TORCHTUNE_TYPES = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "output_proj",
}
_LITGPT_TYPES = {
    "self_attn.q_proj": "lora_query",
    "self_attn.k_proj": "lora_key",
    "self_attn.v_proj": "lora_value",
    "self_attn.o_proj": "lora_projection",
}
#: The parts of an MLP by their names in transformers; such stacks adapt all of them or none.
_MLP = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")


def _torchtune(stack: Stack, fields: Fields) -> Written:
    words = _words(fields, _TORCHTUNE_TYPES)
    attention = [word for word, is_kept in words.items() if is_kept]
    model = {"lora_attn_modules": attention, "apply_lora_to_mlp": _has(fields, *_MLP), "apply_lora_to_output": False}
    return stack.yaml({"model": {**model, **stack.renamed(fields)}})


def _litgpt(stack: Stack, fields: Fields) -> Written:
    flags = {**_words(fields, _LITGPT_TYPES), "lora_mlp": _has(fields, *_MLP), "lora_head": False}
    return stack.yaml({**stack.renamed(fields), **flags})


def _words(fields: Fields, types: Mapping[str, str]) -> dict[str, bool]:
    """The stack's word for each projection, and whether the plan keeps it."""
    return {word: _has(fields, projection) for projection, word in types.items()}


def _has(fields: Fields, *projections: str) -> bool:
    ends = tuple(f".{projection}" for projection in projections)
    return any(name.endswith(ends) for name in fields["target_modules"])


def _types_limits(plan: AdapterPlan) -> str | None:
    kept = sorted({entry.site.projection for entry in plan.entries if entry.r > 0})
    known = (*_TORCHTUNE_TYPES, *_MLP)
    others = [name for name in kept if name not in known]
    if others:
        return f"adapts only {', '.join(known)}, and the plan has {', '.join(others[:3])}"
    if any(name in plan.lora for name in ("layers_to_transform", "exclude_modules")):
        return "adapts all layers, and the plan was made for a part of the model"
    sites = _projections(plan)
    for projection in kept:
        of = [name for name, own in sites.items() if own == projection]
        there = sum(plan.ranks.get(name, 0) > 0 for name in of)
        if there < len(of):
            found = f"{projection} in {there} of {len(of)}"
            return f"adapts a projection in all layers or in none, and the plan has {found}"
    mlp = [name for name in kept if name in _MLP]
    if 0 < len(mlp) < len(_MLP):
        return f"adapts the whole MLP or nothing of it, and the plan has only {', '.join(mlp)}"
    return None


def _projections(plan: AdapterPlan) -> dict[str, str]:
    """Projection of each site of the plan, and of the base model where that is on this machine, by name."""
    sites = [entry.site for entry in plan.entries]
    if plan.base_model and is_here(plan.base_model):
        sites += read_base(plan.base_model, plan.lora.get("task_type")).layers.values()
    return {site.name: site.projection for site in sites}


# -- the table ---------------------------------------------------------------------------------------------------------

_USE = "Put these lines into your configuration:"
_PLAIN = {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
_TYPES = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "", "task_type": ""}
_TRL_COMMAND = Stack(
    "trl",
    "TRL's command line",
    "1.16.0",
    _trl_command,
    use=f"{_USE} trl sft --config yours.yaml",
    options={
        "task_type": "lora_task_type",
        "r": "lora_r",
        **_PLAIN,
        "modules_to_save": "lora_modules_to_save",
        "target_modules": "lora_target_modules",
    },
    whole_alpha=True,
    patterns=True,
)
#: Every stack that ``emit`` knows.
STACKS = (
    Stack("peft", "PEFT", "0.21.2", _peft),
    Stack(
        "peft-benchmark", "PEFT's method comparison", "0.21.2", _benchmark, patterns=True, besides=_benchmark_training
    ),
    Stack("trl", "TRL", "1.16.0", _trl),
    Stack(
        "axolotl",
        "Axolotl",
        "0.19.0",
        _axolotl,
        use=f"{_USE} axolotl train yours.yaml",
        options={
            "r": "lora_r",
            "lora_alpha": "lora_alpha",
            "lora_dropout": "lora_dropout",
            "use_rslora": "peft_use_rslora",
            "use_dora": "peft_use_dora",
            "fan_in_fan_out": "lora_fan_in_fan_out",
            "modules_to_save": "lora_modules_to_save",
            "target_modules": "lora_target_modules",
            "rank_pattern": "lora_rank_pattern",
            "alpha_pattern": "lora_alpha_pattern",
            "task_type": "",  # by the class of the model
        },
        whole_alpha=True,
        patterns=True,
        continuation=lambda adapter: {"adapter": "lora", "lora_model_dir": adapter},
    ),
    Stack(
        "llamafactory",
        "LLaMA-Factory",
        "0.9.5",
        _llamafactory,
        use=f"{_USE} llamafactory-cli train yours.yaml",
        options={
            "r": "lora_rank",
            **_PLAIN,
            "modules_to_save": "additional_target",
            "target_modules": "lora_target",
            "task_type": "",  # always CAUSAL_LM
        },
        whole_alpha=True,
        limits=_llamafactory_limits,
        continuation=lambda adapter: {
            "finetuning_type": "lora",
            "adapter_name_or_path": adapter,
            "create_new_adapter": False,
        },
    ),
    Stack(
        "swift",
        "ms-swift",
        "4.6.0",
        _swift,
        use=f"{_USE} swift sft yours.yaml",
        options={
            "r": "lora_rank",
            **_PLAIN,
            "modules_to_save": "modules_to_save",
            "target_modules": "target_modules",
            "task_type": "",  # by the options of the model
        },
        patterns=True,
        continuation=lambda adapter: {"tuner_type": "lora", "adapters": [adapter]},
    ),
    Stack("unsloth", "Unsloth", "2026.10.9", _unsloth),
    Stack(
        "torchtune",
        "torchtune",
        "0.6.1",
        _torchtune,
        use="Put these lines below the model's _component_ in your configuration: tune run RECIPE --config yours.yaml",
        options={"r": "lora_rank", **_TYPES},
        limits=_types_limits,
    ),
    Stack(
        "litgpt",
        "LitGPT",
        "0.5.13",
        _litgpt,
        use=f"{_USE} litgpt finetune_lora CHECKPOINT --config yours.yaml",
        options={"r": "lora_r", **_TYPES},
        whole_alpha=True,
        limits=_types_limits,
    ),
)


def stack_of(name: str) -> Stack:
    """Return the stack of that name.

    Raises:
        OptionError: There is none.

    Example:
        >>> stack_of("axolotl").title
        'Axolotl'
    """
    known = {stack.name: stack for stack in STACKS}
    if name not in known:
        raise OptionError(f"{name!r} is no training stack{closest(name, known)}: give one of {', '.join(known)}")
    return known[name]
