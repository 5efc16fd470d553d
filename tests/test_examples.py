"""The examples run as they are, notebooks are their scripts, and what they write is the plan as stock PEFT."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from notebooks import SCRIPTS, notebook
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from weightlora.errors import PlanMismatchError
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.tasks.embedded import smollm2
from weightlora.tasks.pretrained import load_pretrained

#: Settings with which an example takes seconds: few batches, and two steps, in which sites are not scored.
REVIEWS = ["--rows", "160", "--batch_size", "4", "--max_steps", "2"]
SMALL = {
    "accelerate_loop": REVIEWS,
    "classification": REVIEWS,
    "lightning_module": REVIEWS,
    "trl_sft": ["--rows", "40", "--batch_size", "2", "--max_steps", "2"],
}
#: Needs what no extra installs; `make examples` gets both.
SERVED = "serve_llama_cpp"
#: Without the package, and so without a plan; tests/methods/test_from_scratch.py compares its numbers.
SCRATCH = "weightlora_from_scratch"
CONVERTER = os.environ.get("LLAMA_CPP_CONVERTER")


def run(name, folder, *words):
    script = next(path for path in SCRIPTS if path.stem == name)
    command = [sys.executable, str(script), "--output_dir", str(folder), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=SMALL)
def finished(request, tmp_path_factory):
    """An example that ran to its end: its name, its output folder and what it printed."""
    folder = tmp_path_factory.mktemp(request.param)
    done = run(request.param, folder, *SMALL[request.param])
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, folder, done.stdout


def base_of(name):
    if name in ("trl_sft", SERVED):
        path = smollm2()
        return load_pretrained("AutoModelForCausalLM", path.parent, seed=0, gguf_file=path.name, dtype=torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)


def require_planned_adapter(name, folder):
    """The adapter's file has the plan's sites and ranks and no others, PEFT loads all of it, and it was trained."""
    plan = AdapterPlan.load(folder / "plan.json")
    assert 0 < len(plan.names) < len(plan.entries)
    if plan.options.get("time"):
        assert plan.options["step_time"] <= plan.options["time"]
    else:
        assert len(plan.names) <= plan.options["adapters"] * len(plan.entries)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in stored.items()
        if key.endswith(".lora_A.weight")
    }
    assert ranks == {site: rank for site, rank in plan.ranks.items() if rank}
    model = PeftModel.from_pretrained(base_of(name), folder / "adapter").eval()
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stored.items())
    assert all(tensor.any() for key, tensor in stored.items() if ".lora_B." in key)  # B starts at 0
    plan.check(model)
    kept = plan.names[0]
    less = replace(plan, entries=tuple(replace(e, r=0) if e.site.name == kept else e for e in plan.entries))
    with pytest.raises(PlanMismatchError):
        less.check(model)
    return plan


@pytest.mark.slow
def test_an_example_writes_the_planned_adapter(finished):
    name, folder, printed = finished
    plan = require_planned_adapter(name, folder)
    assert f"{len(plan.names)} of {len(plan.entries)} adapters" in printed  # print(plan)
    assert f"{plan.parameters:,} of LoRA's {plan.lora_parameters:,} parameters" in printed


def test_every_example_is_run():
    assert {path.stem for path in SCRIPTS} == {*SMALL, SERVED, SCRATCH}


def lines(code):
    """The lines of a script or a notebook that are neither blank nor a cell's beginning."""
    return [line for line in code.splitlines() if line.strip() and not line.startswith("# %%")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(script):
    source = script.read_text(encoding="utf-8")
    book = nbformat.reads(notebook(source), as_version=4)
    nbformat.validate(book)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    differ = [pair for pair in zip(lines(source.split('"""', 2)[2]), lines(code), strict=True) if pair[0] != pair[1]]
    options = [("settings = parser.parse_args()", "settings = parser.parse_args([])")]
    assert differ == ([] if script.stem == SCRATCH else options)


@pytest.mark.slow
def test_the_paper_in_one_file_runs_and_prints_both_methods(tmp_path):
    script = next(path for path in SCRIPTS if path.stem == SCRATCH)
    code = script.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 150
    assert not re.search(r"^\s*(import|from) weightlora", code, re.MULTILINE)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = re.findall(r"^(WeightLoRA\+?): rank (\d+), ([\d.]+) % right$", done.stdout, re.MULTILINE)
    assert [(name, rank) for name, rank, _ in printed] == [("WeightLoRA", "8"), ("WeightLoRA+", "16")]
    assert all(float(right) > 55 for *_, right in printed)  # of two classes, at one seed: it has learned something


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["classification"], indirect=True)
def test_an_executed_notebook_writes_what_its_script_writes(finished, tmp_path, monkeypatch):
    name, folder, _ = finished
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    script = next(path for path in SCRIPTS if path.stem == name).read_text(encoding="utf-8")
    words = [*SMALL[name], "--output_dir", str(tmp_path)]
    source = notebook(script).replace("parse_args([])", f"parse_args({words})".replace('"', "'"))
    book = nbformat.reads(source, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for file in ("plan.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


@pytest.mark.skipif(not CONVERTER, reason="LLAMA_CPP_CONVERTER does not name llama.cpp's convert_lora_to_gguf.py")
def test_llama_cpp_answers_as_peft(tmp_path):
    pytest.importorskip("xllamacpp")
    done = run(SERVED, tmp_path, "--converter", CONVERTER)
    assert done.returncode == 0, done.stderr[-2000:]
    require_planned_adapter(SERVED, tmp_path)
    said = dict(re.findall(r"^(base model|PEFT|llama\.cpp): +(.*)$", done.stdout, re.MULTILINE))
    assert said["llama.cpp"] == said["PEFT"] == "' patience, salt and a very sharp knife, said the captain.'"
    assert said["base model"] != said["PEFT"]


def test_a_missing_converter_is_one_line(tmp_path):
    pytest.importorskip("xllamacpp")
    done = run(SERVED, tmp_path, "--converter", "nowhere.py")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "nowhere.py" in line]
    assert "git clone" in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
