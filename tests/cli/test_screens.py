"""The screens fit a terminal of 80 columns and explain themselves; libraries add nothing to them."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import pytest

from weightlora.cli import main
from weightlora.cli._help import options_help
from weightlora.cost.estimate import estimate
from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite
from weightlora.runs.recipe import MethodOptions, ModelOptions, TaskOptions

WIDTH = 80
OPTIONS = {
    "adapters": 0.5,
    "steps": 20,
    "head_steps": None,
    "threshold_every": 1,
    "learning_rate": 0.001,
    "expand": "ranks",
}


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.fixture
def plan(tmp_path):
    """Two layers of two projections, half of them kept."""
    names = [f"encoder.layer.{i}.{name}" for i in range(2) for name in ("query", "value")]
    entries = tuple(
        PlannedSite(Site(name, 8, 8), 4, 8, r=4 * (i % 2), alpha=8, score=float(i)) for i, name in enumerate(names)
    )
    path = tmp_path / "plan.json"
    AdapterPlan(entries, rule="first_order", options=OPTIONS, seed=7, base_model="embedded/minilm").save(path)
    return path


def screen(capsys, *words):
    """What a command prints, without what wraps it; no line may be longer than the terminal."""
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert max(map(len, captured.out.splitlines())) <= WIDTH
    return captured.out


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "select",
        "train",
        "show",
        "estimate",
        "analyse",
        "analyse dot-product",
        "bench",
        "bench merge",
        "paper",
        "methods",
    ],
)
def test_help_fits_and_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert "example: weightlora" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH


def test_show_explains_every_line(plan, capsys):
    printed = screen(capsys, "show", plan)
    assert "{" not in printed  # no dict
    rows = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    for name in OPTIONS:
        assert len(rows[name].split()) >= 3, f"{name} has no value or meaning"
    assert "limit: at most so many adapters" in rows["adapters"]
    assert "none" in rows["head_steps"]
    assert "first_order" in rows["rule"]
    assert " 7 " in rows["seed"]
    assert f"{2 * 4 * 16} of LoRA's 256 parameters (50.0 %)" in rows["kept"]
    assert printed.startswith(str(AdapterPlan.load(plan)))  # the screen of print(plan)
    assert "embedded/minilm" in rows["base"]


def test_show_writes_the_knee_plot_that_it_is_asked_for(plan, tmp_path, monkeypatch, capsys):
    """The scores are 0, 1, 2 and 3: of four sites of one size the best two have 5/6 of them, and the best one half."""
    assert "of the gain" not in screen(capsys, "show", plan)
    # Three quarters need the 2 and the 3. One order in six begins with them: 50 %. Half of them end with one: 100 %.
    monkeypatch.chdir(tmp_path)  # a long path would be one long line
    printed = " ".join(screen(capsys, "show", plan, "--knee", "k.png").split())
    assert "75 % of the gain is in 2 of 4 sites with 50 % of the parameters; random sites need " in printed
    assert " % of the parameters for as much (8 of 10 orders: 50 % to 100 %)" in printed
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


def test_a_knee_plot_needs_scores(plan, tmp_path, capsys):
    old = AdapterPlan.load(plan)
    AdapterPlan(tuple(replace(entry, score=0.0) for entry in old.entries), rule="random").save(plan)
    assert main(["show", str(plan), "--knee", str(tmp_path / "k.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no site of this plan has a positive score (rule 'random')" in captured.err
    assert not (tmp_path / "k.png").exists()


def test_show_of_a_long_path_and_of_unknown_options_fits_too(plan, capsys):
    old = AdapterPlan.load(plan)
    name = "/usr/lib/python3/site-packages/" + "a_folder/" * 12 + "model"
    changed = AdapterPlan(old.entries, rule="adalora", options={"init_r": 12, "by": ["a", 1.5]}, base_model=name)
    changed.save(plan)
    printed = screen(capsys, "show", plan)
    assert "option of adalora" in printed
    assert "a, 1.5" in printed
    values = [line[18:52].strip() for line in printed.splitlines()]  # the column of values, where the name is folded
    assert name in "".join(values)


def test_methods_keeps_summary_and_paper_whole(capsys):
    from weightlora.methods import METHODS

    printed = " ".join(screen(capsys, "methods").split())
    for entry in METHODS:
        assert f"{entry.name} {entry.summary} {entry.paper}" in printed


def test_tasks_keep_metrics_columns_and_data_whole(capsys):
    from weightlora.tasks import TASKS

    printed = " ".join(screen(capsys, "methods", "--tasks").split())
    for task in TASKS:
        columns = ", ".join(task.columns.values())
        assert f"{task.name} {', '.join(task.metrics)} columns: {columns} data: {task.dataset or 'your own'}" in printed


def test_estimate_names_its_rows_and_columns(minilm, tmp_path, capsys):
    path = tmp_path / "plan.json"
    site = Site("bert.encoder.layer.5.output.dense", 1536, 384)
    entries = (PlannedSite(site, 8, 8, r=8, alpha=8, score=1.0),)
    plan = AdapterPlan(entries, lora={"task_type": "SEQ_CLS"}, base_model=minilm.config.name_or_path)
    plan.save(path)
    printed = screen(capsys, "estimate", path, "--batch", "2x16", "--fast")
    rows = {line.rstrip()[:18].strip(): line for line in printed.splitlines() if "–" in line}
    assert list(rows) == ["plan", "WeightLoRA+", "LoRA, fast", "plan, fast", "WeightLoRA+, fast"]
    assert "expanded" not in printed
    for name in ("AdamW", "saved", "total", "step", "spread", "WeightLoRA+"):
        assert any(line.startswith(f"{name} ") for line in printed.splitlines()), f"{name} is not explained"


@pytest.mark.slow
def test_the_median_lies_in_the_spread(minilm, review_batches):
    site = Site("bert.encoder.layer.5.output.dense", 1536, 384)
    plan = AdapterPlan((PlannedSite(site, 8, 8, r=8, alpha=8, score=1.0),), lora={"task_type": "SEQ_CLS"})
    batch = review_batches[0]
    lora, *others = estimate(plan, minilm, lambda model, _: model(**batch).loss, rows=8, length=24)
    assert (lora.step_ratio, lora.step_range) == (1.0, (1.0, 1.0))
    for line in others:
        assert line.step_range[0] <= line.step_ratio <= line.step_range[1]


@dataclass
class Example:
    """Settings of an example.

    More about it.
    """

    name: str = field(default="x", metadata={"help": "a name"})
    count: int | None = field(default=None, metadata={"help": "how many; default: as many as there are"})
    rate: float = field(default=0.5, metadata={"help": "a rate"})
    wanted: bool = field(default=False, metadata={"help": "a wish"})
    kind: Literal["a", "b"] | None = field(default=None, metadata={"help": "a kind", "nargs": "?"})
    words: list[str] = field(default_factory=list[str], metadata={"help": "some words " * 12})
    seeds: Sequence[int] = field(default=(0, 1), metadata={"help": "seeds"})
    table: dict[str, Any] | None = field(default=None, metadata={"help": "settings"})


def test_option_help_has_type_default_and_meaning():
    lines = options_help(Example, width=60).splitlines()
    assert lines[:5] == [
        "Settings of an example:",
        "  --name TEXT (default: x)",
        "      a name",
        "  --count INT",
        "      how many; default: as many as there are",
    ]
    heads = [line.strip() for line in lines if line.startswith("  --")]
    assert heads[2:] == [
        "--rate FLOAT (default: 0.5)",
        "--wanted [true|false] (default: false)",
        "--kind [{a,b}] (default: none)",
        "--words TEXT ... (default: none)",
        "--seeds INT ... (default: 0 1)",
        "--table TEXT (default: none)",
    ]
    assert max(map(len, lines)) <= 58


@pytest.mark.parametrize("command", ["train", "select", "bench", "demo", "analyse dot-product"])
def test_commands_that_read_a_recipe_show_its_options(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "--lora_r INT (default: 8)\n" in capsys.readouterr().out


def test_option_help_of_a_recipe_leaves_nothing_out():
    parts = (ModelOptions, TaskOptions, MethodOptions)
    text = options_help(*parts, width=WIDTH)
    assert max(map(len, text.splitlines())) <= WIDTH
    blocks = {block.split()[0]: block for block in text.split("  --")[1:]}
    for part in parts:
        for option in fields(part):
            assert "default: " in blocks[option.name]
            assert len(blocks[option.name].splitlines()) >= 2


def test_a_kernel_for_quantised_models_is_not_talked_about():
    code = (
        "import logging, sys\n"
        "from weightlora.cli import main\n"
        "assert main(['methods']) == 0\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from %s', 'somewhere')\n"
        "log.warning('something else')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "something else\n"


def test_a_plan_is_shown_without_the_libraries_that_train(plan):
    words = [sys.executable, "-X", "importtime", "-m", "weightlora", "show", str(plan)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "peft", "transformers", "bitsandbytes"})
