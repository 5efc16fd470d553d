"""Every setting of the paper's Tables 8 to 12 beside that of its recipe, as Markdown.

    python benchmarks/paper_settings.py PAPER.txt > docs/lab/paper-settings.md

PAPER.txt is the paper as text, a line "name<tab>value" for each setting. A difference without a reason below, or a
reason without a difference, is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig

from weightlora.bench.grid import QUIET, Row
from weightlora.cost.empty_model import make_empty_model
from weightlora.errors import DataError
from weightlora.model.sites import find_sites
from weightlora.paper.study import read_study, recipes_folder

#: The paper's tables of settings, and those of results that they are for.
TABLES = {8: ["table1"], 9: ["table2"], 10: ["table3"], 11: ["table4"], 12: ["table5", "table6"]}
#: How the paper names tasks.
TASKS = {
    "MNLI": "mnli",
    "SST-2": "sst2",
    "CoLA": "cola",
    "QQP": "qqp",
    "QNLI": "qnli",
    "RTE": "rte",
    "MRPC": "mrpc",
    "STS-B": "stsb",
    "SQuAD v1.1": "squad",
    "SQuAD v2.0": "squad_v2",
    "XSum": "xsum",
    "CNN/DailyMail": "cnn_dailymail",
}
GROUPS = {"QA": ("squad", "squad_v2"), "NLG": ("xsum", "cnn_dailymail")}
#: Of each model: the file of its sizes, and the head that its sites are counted with.
CONFIGS = {
    "microsoft/deberta-v3-base": ("deberta-v3-base.json", "SEQ_CLS"),
    "meta-llama/Meta-Llama-3-8B": ("llama-3-8b.json", "CAUSAL_LM"),
    "Qwen/Qwen3-8B": ("qwen3-8b.json", "CAUSAL_LM"),
    "facebook/bart-large": ("bart-large.json", "SEQ_2_SEQ_LM"),
}
_BITS = "both cannot be: read as weights in 32 bits, with bf16 as autocast"
#: Why a recipe differs, by the number of the paper's table, the study and the setting.
REASONS: dict[tuple[int, str, str], str] = {
    **{
        (number, study, "Optimizer"): "with decoupled decay, as in the authors' code"
        for number, studies in TABLES.items()
        for study in studies
    },
    (10, "table3", "Model"): "there is no Llama 3 of 7B; the text has 8B, too",
    (11, "table4", "Total # adapters (n)"): "the paper's n has the output head, which TRL's loss would pass by",
    (12, "table6", "Total # adapters (n)"): "the paper's 72 are DeBERTa's; the parameters of Table 6 are those of 192",
    (12, "table6", "Max sequence length"): "BART has 1,024 positions",
    (12, "table6", "Effective batch size"): "the paper's own batch size and accumulation make 128",
    (12, "table5", "Backbone precision (dtype)"): _BITS,
    (12, "table6", "Backbone precision (dtype)"): _BITS,
}
#: What the recipes decide and the paper's tables do not name, and where it is from.
SOURCES = {
    "lora_modules_to_save": "the pooler is as fresh as the classifier",
    "held_out_samples": "training rows that the grids are compared on; the paper does not say which it used",
    "doc_stride": "of run_squad.py",
    "max_target_length": "of the model's own config",
    "num_beams": "of the model's own config",
}


def main(path: Path) -> int:
    """Print the tables; return 1 where a difference has no reason, or a reason no difference."""
    text = path.read_text(encoding="utf-8")
    unsaid, used = list[str](), set[tuple[int, str, str]]()
    print(f"# The paper's settings and the recipes'\n\n{_INTRO}")
    for number, studies in TABLES.items():
        print(
            f"\n## Table {number}\n\n| setting | tasks | paper | recipe | difference |\n| --- | --- | --- | --- | --- |"
        )
        for study in studies:
            rows = read_study(study, recipes_folder()).grid("full", Path(), checked=False).rows
            for setting, value in settings_of(text, number).items():
                for tasks, theirs, ours in compared(setting, value, rows):
                    key, same = (number, study, setting), alike(setting, theirs, ours)
                    used |= set() if same else {key}
                    reason = "" if same else REASONS.get(key, "**not said**")
                    unsaid += [f"{key}: {theirs} and {ours}"] if reason == "**not said**" else []
                    name = f"{setting} ({study})" if len(studies) > 1 else setting
                    print(f"| {plain(name)} | {tasks} | {plain(theirs)} | {ours} | {reason} |")
    print("\n## What the tables do not say\n\n| option | study: value | from |\n| --- | --- | --- |")
    for line in _besides():
        print(line)
    unsaid += [f"{key}: a reason, and no difference" for key in REASONS.keys() - used]
    print(*unsaid, sep="\n", end="\n" if unsaid else "", file=sys.stderr)
    return int(bool(unsaid))


_INTRO = """\
`python benchmarks/paper_settings.py PAPER.txt` made this. A recipe is what `weightlora paper NAME --size full` runs;
of a grid all values are listed. Dropout acts on an adapter's input, as in PEFT and in the authors' code of LoRA;
Appendix A has it after the down-projection (`--fast rank`)."""


def settings_of(text: str, number: int) -> dict[str, str]:
    """Return the settings of one of the paper's tables, by name.

    Raises:
        DataError: The text has no such table.
    """
    found = re.search(
        rf"^Table {number}: Hyperparameter setup.*\n\s*\nHyperparameter\tValue\n((?:.+\t.+\n?)+)", text, re.M
    )
    if found is None:
        raise DataError(f"the paper's text has no Table {number} with lines 'name<tab>value'")
    return dict(line.split("\t", 1) for line in found.group(1).splitlines())


def by_task(value: str, tasks: Sequence[str]) -> dict[str, str]:
    """Return what a value such as ``7 (MNLI); 5 (QQP, QNLI)`` says of each task.

    Example:
        >>> by_task("7 (MNLI); 5 (QQP, QNLI)", ["mnli", "qqp"]), by_task("32 (no quantization)", ["mnli"])
        ({'mnli': '7', 'qqp': '5'}, {'mnli': '32 (no quantization)'})
    """
    said: dict[str, str] = {}
    for part in value.split(";"):
        match = re.fullmatch(r"\s*(.+?)\s*\((.+)\)\s*", part)
        names = [name.strip() for name in match.group(2).split(",")] if match else []
        if match and all(name in {**TASKS, **GROUPS} for name in names):
            each = [task for name in names for task in GROUPS.get(name, (TASKS.get(name, ""),))]
            said |= dict.fromkeys(each, match.group(1))
    return {task: said.get(task, "–" if said else value.strip()) for task in tasks}


def compared(setting: str, value: str, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return tasks, the paper's value and the recipe's; tasks that have both in common are one line."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    theirs = by_task(value, tasks)
    pairs = {task: (theirs[task], recipe_value(setting, [row for row in rows if row.task == task])) for task in tasks}
    lines = dict.fromkeys(pairs.values())
    shown = {pair: ", ".join(task for task in tasks if pairs[task] == pair) for pair in lines}
    return [("all" if len(lines) == 1 else shown[pair], *pair) for pair in lines]


def recipe_value(setting: str, rows: Sequence[Row]) -> str:
    """Return what the recipes of one task have for a setting of the paper.

    Raises:
        DataError: The setting is none that is known.
    """
    if setting not in READINGS:
        raise DataError(f"{setting!r} is no known setting of the paper; there are {', '.join(READINGS)}")
    values = [READINGS[setting](options) for row in rows for options in _choices(row)]
    return ", ".join(dict.fromkeys(sorted(values, key=lambda value: numbers(value) or [0.0])))


def alike(setting: str, theirs: str, ours: str) -> bool:
    """Whether two values are equal: as numbers where the paper has one, else as words."""
    if setting in ("Experiment", "Adapter placement"):  # words, of which n is the number
        return True
    if setting == "Model":
        names = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in theirs.split(";")}
        return any(re.sub(r" .*", "", name) in re.sub(r"[^a-z0-9]", "", ours.lower()) for name in names)
    if numbers(theirs) and setting not in ("LoRA precision (dtype)", "Backbone precision (dtype)"):
        return sorted(numbers(theirs)) == sorted(numbers(ours))
    return theirs.lower() == ours.lower()


def plain(text: str) -> str:
    r"""Return a text of the paper without LaTeX.

    Example:
        >>> plain(r"$\{5 \times 10^{-5}, 10^{-4}, 3 \cdot 10^{-3}\}$"), plain("1×10^{-8}"), plain(r"$\beta_1$")
        ('{5e-5, 1e-4, 3e-3}', '1e-8', 'β1')
    """
    text = re.sub(r"\s*(\\times|\\cdot|×)\s*10\^\{(-?\d+)\}", r"e\2", text)
    text = re.sub(r"(?<![\d.])10\^\{(-?\d+)\}", r"1e\1", text)
    for latex, letter in {r"\beta_": "β", r"\epsilon": "ε", r"\{": "{", r"\}": "}", "$": ""}.items():
        text = text.replace(latex, letter)
    return text


def numbers(text: str) -> list[float]:
    r"""Return the numbers of a text, but for that of a table that it refers to.

    Example:
        >>> numbers(r"as in Table 9: $\{5 \times 10^{-5}, 10^{-4}\}$"), numbers("32 (no quantization)")
        ([5e-05, 0.0001], [32.0])
    """
    text = re.sub(r"Table \d+", "", plain(text))
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", text)]


def sites_of(options: Mapping[str, Any]) -> int:
    """Return n: the layers of the published size that the recipe's adapters are put on."""
    file, task_type = CONFIGS[options["model_name_or_path"]]
    model = make_empty_model(AutoConfig.from_pretrained(str(recipes_folder() / "configs" / file)), task_type)
    return len(find_sites(model, LoraConfig(target_modules=options["lora_target_modules"])).sites)


_counted: dict[str, int] = {}


def _n(options: Mapping[str, Any]) -> str:
    key = f"{options['model_name_or_path']} {options['lora_target_modules']}"
    if key not in _counted:
        _counted[key] = sites_of(options)
    return str(_counted[key])


def _bits(options: Mapping[str, Any]) -> str:
    if options.get("load_in_8bit"):
        return "8"
    return {"float32": "32", "bfloat16": "16"}[options["dtype"]]


def _dtype(options: Mapping[str, Any]) -> str:
    return "bf16" if options["dtype"] == "bfloat16" else options["dtype"]


READINGS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Experiment": lambda _: "",
    "Model": lambda o: o["model_name_or_path"],
    "Adapter placement": lambda o: ", ".join(o["lora_target_modules"]),
    "Total # adapters (n)": _n,
    "Optimizer": lambda o: o["optim"],
    r"$\beta_1, \beta_2, \epsilon$": lambda o: f"{o['adam_beta1']}, {o['adam_beta2']}, {o['adam_epsilon']:g}",
    "Weight decay": lambda o: f"{o['weight_decay']:g}",
    "Learning rate": lambda o: f"{o['learning_rate']:g}",
    "LR scheduler": lambda o: o["lr_scheduler_type"],
    "Warm-up steps": lambda o: str(o["warmup_steps"]),
    "Max train steps": lambda o: str(o["max_steps"]),
    "# Training steps": lambda o: str(o["max_steps"]),
    "# Epochs": lambda o: str(o["num_train_epochs"]),
    "Max sequence length": lambda o: str(o["max_seq_length"]),
    "LoRA precision (dtype)": lambda o: "bf16" if o["bf16"] else _dtype(o),
    "Backbone precision (dtype)": _dtype,
    "Backbone quantization bits": _bits,
    "Batch size": lambda o: str(o["per_device_train_batch_size"]),
    "Gradient accumulation steps": lambda o: str(o["gradient_accumulation_steps"]),
    "Effective batch size": lambda o: str(o["per_device_train_batch_size"] * o["gradient_accumulation_steps"]),
    "LoRA rank r": lambda o: str(o["lora_r"]),
    "LoRA scaling ω": lambda o: str(o["lora_alpha"]),
    "LoRA dropout": lambda o: str(o["lora_dropout"]),
}
#: Options that the readings have read, and those of the rows themselves.
_READ = {
    *("model_name_or_path", "lora_target_modules", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "max_seq_length", "bf16"),
    *("dtype", "load_in_8bit", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha"),
    *("lora_dropout", "task", "method", "adapters", "method_options", *QUIET),
}


def _choices(row: Row) -> list[dict[str, Any]]:
    return [{**row.options, **choice} for choice in row.choices]


def _besides() -> list[str]:
    """A line for each option that no setting has read, and the number of seeds."""
    values: dict[str, dict[str, set[str]]] = {}
    seeds: dict[str, set[str]] = {}
    for study in (name for names in TABLES.values() for name in names):
        grid = read_study(study, recipes_folder()).grid("full", Path(), checked=False)
        seeds[study] = {str(len(grid.seeds))}
        for row in grid.rows:
            for name in row.options.keys() - _READ:
                values.setdefault(name, {}).setdefault(study, set()).add(str(row.options[name]))
    values = {"seeds": seeds, **dict(sorted(values.items()))}
    sources = {"seeds": "Appendix E: five, which it does not name", **SOURCES}
    lines: list[str] = []
    for name, known in values.items():
        told = "; ".join(f"{study}: {', '.join(sorted(each))}" for study, each in known.items())
        lines.append(f"| {name} | {told} | {sources[name]} |")
    return lines


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
