"""Peak memory of a selection on a model that is whole, offloaded to the disk, or in 4 bits; each in a new process.

    python benchmarks/offload.py          # prints Markdown, appends benchmarks/results/offload.jsonl

The model is a Llama with random weights, written to a temporary folder in fp32. What is reported is the process's peak
resident memory less its memory after the imports, divided by the bytes of the weights. Pages of a mapped file count as
resident until the system takes them back, so the offloaded figure is an upper bound. "Step" is a training step of the
planned adapters on the same offloaded model, without our scoring: autograd keeps the weights there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from weightlora import select
from weightlora.bench.records import append_record
from weightlora.plan.plan import AdapterPlan

RESULTS = Path(__file__).parent / "results" / "offload.jsonl"
KINDS = ("whole", "disk", "disk, checkpointing", "disk, step", "4 bits")
STEPS, ROWS, TOKENS = 2, 2, 32


def main() -> None:
    """Measure each kind in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        kind, folder = options.one[0], Path(options.one[1])
        found = write_model(folder, options.hidden_size, options.layers) if kind == "write" else measured(kind, folder)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        # A process inherits the peak of the one that starts it: the model is never in this one.
        in_new_process("write", folder, "--hidden_size", str(options.hidden_size), "--layers", str(options.layers))
        rows = {kind: in_new_process(kind, folder) for kind in KINDS}
    whole = rows["whole"]
    print("| model | weights, MB | peak, MB | peak ÷ weights | seconds | sites as whole |\n|" + " --- |" * 6)
    for kind, row in rows.items():
        same = len({*row["kept"]} & {*whole["kept"]})
        sites = f"{same} of {len(whole['kept'])}" + ", same scores" * (row["scores"] == whole["scores"])
        sizes = f"{row['weights'] / 1e6:.0f} | {row['peak'] / 1e6:.0f} | {row['peak'] / row['weights']:.2f}"
        print(f"| {kind} | {sizes} | {row['seconds']:.1f} | {sites} |")
        numbers = {key: row[key] for key in ("weights", "peak", "seconds")}
        append_record(RESULTS, {"kind": kind, "same_sites": same, "sites": len(whole["kept"]), **numbers})


def write_model(folder: Path, hidden_size: int, layers: int) -> None:
    """Write random weights; 4·h² + 3·h·(3·h) numbers in each block."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=512, num_attention_heads=hidden_size // 64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="64MB")


def in_new_process(kind: str, folder: str, *words: str) -> dict[str, Any]:
    """Do one part in a process that does nothing else, and return what it prints."""
    command = [sys.executable, __file__, "--one", kind, folder, *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(kind: str, folder: Path) -> dict[str, Any]:
    """Peak memory above that of the imports, seconds, and the plan."""
    before = peak_bytes()
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 512, (ROWS, TOKENS))} for _ in range(STEPS)]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as offloaded:
        model = load(kind, folder, offloaded)
        if kind == "disk, step":
            plan = AdapterPlan.load(folder / "plan.json")
            plan.attach(model)(**batches[0]).loss.backward()
        else:
            lora = LoraConfig(r=8, task_type="CAUSAL_LM")
            plan = select(model, batches, lora=lora, parameters=0.5, rule="first_order", steps=STEPS, progress=False)
            if kind == "whole":
                plan.save(folder / "plan.json")
    seconds = time.perf_counter() - start
    return {
        "weights": weights,
        "peak": peak_bytes() - before,
        "seconds": seconds,
        "kept": plan.names,
        "scores": dict(plan.scores),
    }


def load(kind: str, folder: Path, offloaded: str) -> Any:
    """The model as a user loads it."""
    if kind == "whole":
        return LlamaForCausalLM.from_pretrained(folder)
    if kind == "4 bits":
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=four, device_map={"": "cpu"})
    places = {"model.layers": "disk", **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")}
    places["lm_head"] = "cpu"
    model: Any = LlamaForCausalLM.from_pretrained(folder, device_map=places, offload_folder=offloaded)
    if kind == "disk, checkpointing":
        model.activation_checkpointing_enable()
    return model


def peak_bytes() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
