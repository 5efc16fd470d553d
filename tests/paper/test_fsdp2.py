"""The recipe of Figure 3 in bfloat16 under FSDP2: its two commands, on a small Llama, in two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from small_models import JUDGED, of_bytes, write_judge
from transformers import LlamaConfig, LlamaForCausalLM

from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks import find_task

FOLDER = Path(__file__).parents[2] / "recipes" / "paper"
#: Of Llama-3.1 70B's shape: seven projections a block, grouped queries.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
N = 4 * 7


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder with what `weightlora select` in 4 bit and `accelerate launch ... train` have left there."""
    folder = tmp_path_factory.mktemp("figure3")
    words = of_bytes(None)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), **SIZES, num_key_value_heads=2, eos_token_id=words.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    rows = Dataset.from_list([JUDGED["gsm8k"]] * 16)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "rows")

    options = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "rows",
        "adapters": N // 2,
        "use_cpu": True,
    }
    options |= {
        "harness_path": write_judge(find_task("gsm8k"), folder / "judge"),
        "steps": 2,
        "rule_options": "gate_lr=0.1",
    }
    options |= {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "disable_tqdm": True}
    given = [str(FOLDER / "figure3.yaml#fsdp2-gsm8k"), *(f"--{key}={value}" for key, value in options.items())]
    assert main(["select", "--config", *given, "--load_in_4bit=true", f"--output_dir={folder / 'select'}"]) == 0

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "fsdp2.yaml")]
    worker = [str(Path(__file__).parents[1] / "distributed_worker.py"), "recipe", *given]
    done = subprocess.run(
        [
            *launch,
            "--num_processes",
            "2",
            *worker,
            f"--plan={folder / 'select' / 'plan.json'}",
            f"--output_dir={folder / 'run'}",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_each_process_holds_half_of_the_model(run):
    for process in range(2):
        seen = json.loads((run / "run" / f"seen-{process}.json").read_text())
        assert seen["processes"] == 2
        assert seen["held"] == pytest.approx(seen["whole"] / 2, rel=0.05)  # rows of a matrix are not divided


@pytest.mark.slow
def test_the_adapter_is_stock_and_has_the_plans_sites(run):
    plan = AdapterPlan.load(run / "select" / "plan.json")
    results = json.loads((run / "run" / "results.json").read_text())
    assert (len(plan.names), results["kept"], results["sites"]) == (N // 2, list(plan.names), N)
    assert results["steps"] == 2
    assert "gsm8k_exact_match_strict_match" in results["metrics"]

    base = LlamaForCausalLM.from_pretrained(run / "base")
    ids = torch.arange(8)[None]
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, run / "run" / "adapter")
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(plan.names)
    assert (model(ids).logits - before).abs().max() > 1e-4  # trained: B was zero
