"""What a stranger does with an adapter's folder: the card's own block of Python, with PEFT and transformers alone."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from small_models import of_bytes
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import weightlora
from weightlora.cli import main
from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan
from weightlora.tasks.embedded import minilm as minilm_folder

NAMES = ["games", "net", "science", "sound"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TRAINING = {
    "task": "text_classification",
    "max_seq_length": 16,
    "max_steps": 2,
    "adapters": 0.5,
    "steps": 2,
    "rule": "first_order",
    "rule_options": "head_steps=0",
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier of four named classes."""
    folder = tmp_path_factory.mktemp("card")
    rows = "".join(f"a text of {name} number {i},{name}\n" for i in range(4) for name in NAMES)
    (folder / "rows.csv").write_text("text,label\n" + rows)
    files = {"train_file": folder / "rows.csv", "validation_file": folder / "rows.csv", "output_dir": folder / "run"}
    assert main(["train", *(f"--{name}={value}" for name, value in (TRAINING | files).items())]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A home whose cache holds the hub's MiniLM."""
    home = tmp_path_factory.mktemp("home")
    model = home / "hub" / f"models--{MINILM.replace('/', '--')}"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for file in minilm_folder().iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(file)
    return home


def printed(folder, home):
    """What the card's block of Python prints in a process that has never heard of weightlora."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    block += "\nimport sys\nassert not [name for name in sys.modules if name.startswith('weightlora')]\n"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-W", "ignore", "-c", block]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_block_of_the_card_says_the_name_of_a_class(run, hub, tmp_path):
    assert printed(run / "adapter", hub).strip() in NAMES
    labels = json.loads((run / "adapter" / "labels.json").read_text())
    assert labels == {
        "id2label": {str(i): name for i, name in enumerate(NAMES)},
        "label2id": {name: i for i, name in enumerate(NAMES)},
    }
    # With it, transformers would take the folder for a whole model and look for its weights there.
    assert not (run / "adapter" / "config.json").exists()
    served = weightlora.export(run / "adapter", "vllm", tmp_path / "served")
    assert printed(served, hub) == printed(run / "adapter", hub)


@pytest.mark.slow
def test_the_card_loads_what_was_trained(run, hub):
    """The class that the block names is the one that the adapter says of the same text."""
    base = AutoModelForSequenceClassification.from_pretrained(str(minilm_folder()), num_labels=4)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    inputs = AutoTokenizer.from_pretrained(run / "adapter")("a text", return_tensors="pt")
    with torch.no_grad():
        assert printed(run / "adapter", hub).strip() == NAMES[model(**inputs).logits.argmax()]


def test_the_adapter_names_the_hubs_model_and_check_reads_the_copy(run, capsys):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MINILM
    assert json.loads((run / "plan.json").read_text())["base_model"] == MINILM
    capsys.readouterr()
    assert main(["check", str(run), "--for", "vllm"]) == 0  # "not known" where the base model is not read
    assert capsys.readouterr().out.split() == ["vllm", "yes"]


def test_the_card_says_what_the_adapter_is_and_nothing_of_a_template(run):
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.base_model == MINILM
    assert card.data.library_name == "peft"
    assert {"lora", "weightlora", f"base_model:adapter:{MINILM}"} <= set(card.data.tags)
    results = json.loads((run / "results.json").read_text())
    assert f"{results['adapters']} of 36 sites" in card.text
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", card.text, re.MULTILINE))
    assert rows == {name: f"{value:.4g}" for name, value in results["metrics"].items()}
    for file in (run / "adapter" / "README.md", run / "checkpoint-2" / "README.md"):
        text = file.read_text()
        assert "More Information Needed" not in text
        assert len(text.splitlines()) < 80


@pytest.mark.slow
def test_a_text_model_of_this_machine_is_loaded_from_its_folder(hub, tmp_path):
    tokenizer = of_bytes(None)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, task_type="CAUSAL_LM")
    sites = find_sites(model, lora).sites
    plan = make_plan(sites, lora, [sites[0].name])
    plan.save_adapter(plan.attach(model), tmp_path / "adapter")
    assert "a text" in printed(tmp_path / "adapter", hub)
    assert "labels.json" not in {file.name for file in (tmp_path / "adapter").iterdir()}


def test_where_the_task_is_not_known_the_block_takes_the_users_model(minilm, tmp_path):
    lora = LoraConfig(r=2)
    sites = find_sites(minilm, lora).sites
    plan = make_plan(sites, lora, [sites[0].name])
    plan.save_adapter(plan.attach(minilm), tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base_model, ".")' in text
