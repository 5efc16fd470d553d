"""Adapters of MiniLM as a classifier, trained by ``weightlora train``: a clear verdict for each runtime."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from weightlora.cli import main
from weightlora.serving import READERS
from weightlora.tasks.embedded import minilm

TRAINING = {
    "task": "rotten_tomatoes",
    "max_train_samples": 32,
    "max_eval_samples": 8,
    "max_seq_length": 16,
    "max_steps": 2,
    "adapters": 0.5,
    "steps": 2,
    "rule": "first_order",
    "rule_options": "head_steps=0",
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
OTHERS = [reader.name for reader in READERS if reader.name != "vllm"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "run"
    assert main(["train", *(f"--{name}={value}" for name, value in TRAINING.items()), f"--output_dir={folder}"]) == 0
    return folder / "adapter"


@torch.no_grad()
def logits(folder):
    model = AutoModelForSequenceClassification.from_pretrained(str(minilm()), num_labels=2)
    return PeftModel.from_pretrained(model, folder).eval()(input_ids=torch.tensor([[101, 2204, 3185, 102]])).logits


def with_config(adapter, folder, **fields):
    shutil.copytree(adapter, folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return folder


def test_vllm_reads_a_classifier_with_its_head(adapter, tmp_path, capsys):
    assert main(["check", str(adapter), "--for", "vllm"]) == 0
    assert capsys.readouterr().out.split() == ["vllm", "yes"]
    assert main(["export", str(adapter), "--for", "vllm", "--output_dir", str(tmp_path / "served")]) == 0
    assert logits(tmp_path / "served").equal(logits(adapter))


@pytest.mark.parametrize("runtime", OTHERS)
def test_the_others_get_one_reason_that_names_the_task(runtime, adapter, tmp_path, capsys):
    assert main(["check", str(adapter), "--for", runtime]) == 1
    verdict, *reasons = capsys.readouterr().out.splitlines()
    assert verdict.split() == [runtime, "no"]
    (reason,) = reasons
    assert "only known to read adapters of CAUSAL_LM" in reason
    assert "task_type='SEQ_CLS'" in reason
    assert main(["export", str(adapter), "--for", runtime, "--output_dir", str(tmp_path / "served")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("task_type='SEQ_CLS'", line)
    assert not (tmp_path / "served").exists()


def test_the_task_type_decides_and_without_one_the_tensors_do(adapter, tmp_path, capsys):
    """The controls: what is said is read from the files, and is not the same for all adapters of encoders."""
    for task in ("TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS"):
        folder = with_config(adapter, tmp_path / task, task_type=task)
        assert main(["check", str(folder), "--for", "vllm"]) == 1
        assert f"task_type='{task}'" in capsys.readouterr().out
    bare = with_config(adapter, tmp_path / "none", task_type=None)
    assert main(["check", str(bare), "--for", "llama.cpp"]) == 1
    assert "classifier.bias among them" in capsys.readouterr().out
