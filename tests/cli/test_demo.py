"""The demo, on fewer sentences: what it leaves behind is whole, stock and what the table says."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from weightlora.cli import main
from weightlora.errors import WeightLoraWarning
from weightlora.plan.plan import AdapterPlan

METHODS = ("lora", "random", "weightlora", "weightlora_plus")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    with warnings.catch_warnings():
        # 8 sentences make one batch: the warm-up says that it is used again.
        warnings.simplefilter("ignore", WeightLoraWarning)
        assert main(["demo", "--train_size", "8", "--test_size", "8", "--fast", "--output_dir", str(folder)]) == 0
    return folder


def test_it_leaves_what_it_promises(demo):
    left = {path.name for path in demo.iterdir()}
    assert left == {"plan.json", "heatmap.png", "results.json", *METHODS}
    assert (demo / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_each_adapter_is_stock(demo):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_probe.py")), str(demo)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(METHODS)


def test_a_changed_adapter_is_noticed(demo, tmp_path):
    """The control of the test above: other logits do not pass."""
    results = json.loads((demo / "results.json").read_text())
    results["probe"]["logits"]["lora"][0][0] += 1e-4
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "results.json").write_text(json.dumps(results))
    (changed / "lora").symlink_to(demo / "lora")
    probe = Path(__file__).with_name("stock_probe.py")
    done = subprocess.run([sys.executable, str(probe), str(changed)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_the_numbers_are_those_of_the_plans(demo):
    lines = {line["method"]: line for line in json.loads((demo / "results.json").read_text())["methods"]}
    head = 384 * 2 + 2  # MiniLM's hidden size × labels, and the bias
    for method in METHODS:
        plan = AdapterPlan.load(demo / method / "plan.json")
        assert lines[method]["adapters"] == len(plan.names) == (36 if method == "lora" else 18)
        assert lines[method]["parameters"] == plan.parameters + head
    assert lines["lora"]["step_ratio"] == 1.0
    assert lines["weightlora_plus"]["parameters"] <= lines["lora"]["parameters"]


def test_it_selects_with_the_fast_step(demo):
    assert json.loads((demo / "results.json").read_text())["settings"]["fast"] is True
    assert AdapterPlan.load(demo / "plan.json").options["fast"] == "input"


def test_plus_has_the_sites_of_weightlora(demo):
    chosen, plus = (AdapterPlan.load(demo / name / "plan.json") for name in ("weightlora", "weightlora_plus"))
    assert plus.names == chosen.names
    assert AdapterPlan.load(demo / "plan.json") == chosen
