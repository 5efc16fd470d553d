"""Run PEFT's own benchmark on a plan, whole, on a CPU: its code, SmolLM2, and sums in place of its data.

    python benchmarks/peft_benchmark.py PEFT/method_comparison/MetaMathQA

A plan is emitted as an experiment, and ``run.py`` of that folder validates, trains, generates, saves and writes its
result, which ``weightlora paper peft`` reads. What a CPU without the hub lacks is given: the name of a device, rows of
sums for MetaMathQA and GSM8K, and texts for the loss before and after. Written into the folder: ``experiments/lora/
weightlora-cpu`` and a result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft.utils
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import AutoTokenizer

import weightlora
from weightlora.tasks.embedded import smollm2
from weightlora.tasks.pretrained import load_pretrained

NAME = "weightlora-cpu"
#: What differs from the benchmark's own settings: a small model, few steps, short answers.
PARAMS = {"dtype": "float32", "batch_size": 2, "batch_size_eval": 4, "max_steps": 4, "eval_steps": 2}
GENERATION = {"max_length": 120, "max_new_tokens": 12}
#: The benchmark wants a loss of 1 to 2 per token of these before the training.
TEXT = 2 * "The sun rises in the east and sets in the west. The moon goes around the earth, and the earth around it. "


def main() -> None:
    """Emit a plan, run the benchmark on it, and compare what it trained with the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    os.chdir(parser.parse_args().folder)  # it wants to be run there
    experiment = Path("experiments") / "lora" / NAME
    shutil.rmtree(experiment, ignore_errors=True)
    with TemporaryDirectory() as base:
        plan = planned(base)
        weightlora.emit(plan, "peft-benchmark", output_dir=experiment)
        params = {"model_id": base, **PARAMS, "generation_kwargs": GENERATION}
        (experiment / "training_params.json").write_text(json.dumps(params))
        run_benchmark(experiment)
    result = max(Path().glob(f"*results/lora--{NAME}*.json"), key=os.path.getmtime)  # by the branch of git it is in
    info = json.loads(result.read_text())["train_info"]
    print(f"plan: {plan.parameters:,} parameters; trained: {info['num_trainable_params']:,}")
    print(f"status: {info['status']}; {json.dumps(info['metrics'][-1])}")
    print(result)


def planned(base: str) -> weightlora.AdapterPlan:
    """Write SmolLM2 into a folder, and return a plan of a quarter of the parameters, for which no batch is read."""
    file = smollm2()
    model = load_pretrained("AutoModelForCausalLM", file.parent, seed=0, gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(base)
    return weightlora.select(model, [], parameters=0.25, lora=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))


def run_benchmark(experiment: Path) -> None:
    """Run the benchmark's main function with what a CPU lacks."""
    sys.path.insert(0, str(Path.cwd()))
    own, peft.utils.infer_device = peft.utils.infer_device, lambda: "cuda"  # its first line refuses a CPU
    import data
    import run
    import utils

    peft.utils.infer_device = own
    utils.device = "cpu"
    utils.get_system_info = lambda: {"accelerator": "none"}  # it asks CUDA for the name
    data.load_dataset = rows
    run.init_accelerator = lambda: 0
    run.print_verbose = lambda *words, **_: print(*words, file=sys.stderr)
    name = utils.validate_experiment_path(str(experiment))
    run.main(path_experiment=str(experiment), experiment_name=name, clean=True, bucket_name=None)


def rows(name: str, *_: Any, streaming: bool = False, **__: Any) -> Any:
    """Return sums in the columns of a data set of the benchmark; of the texts an object with ``take``."""
    if streaming:
        return _Texts()
    draw = random.Random(name)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(60)]
    queries = [f"What is {a} plus {b}?" for a, b in pairs]
    answers = [f"{a} + {b} = {a + b}. The answer is: {a + b}" for a, b in pairs]
    if "gsm8k" in name:
        split = Dataset.from_dict({"question": queries, "answer": [f"{a + b}\n#### {a + b}" for a, b in pairs]})
        return DatasetDict(train=split, test=split.select(range(8)))
    columns = {"query": queries, "response": answers, "type": ["sum"] * 60, "original_question": queries}
    return {"train": Dataset.from_dict(columns)}


class _Texts:
    def take(self, count: int) -> Iterator[dict[str, str]]:
        return iter([{"text": TEXT}] * min(count, 2))


if __name__ == "__main__":
    main()
