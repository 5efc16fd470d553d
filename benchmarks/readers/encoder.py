"""An adapter of the embedded MiniLM as a classifier, trained by `weightlora train`, in vLLM's own adapter reader.

    python benchmarks/readers/encoder.py vllm-0.33.0-*.whl

Prints how many sites and heads vLLM read, and the largest difference of ΔW to PEFT's. vLLM's kernels do not run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

import read_vllm
import torch
from adapters import relative_error
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from weightlora.cli import main as weightlora
from weightlora.tasks.embedded import minilm

#: The linear layers of vLLM's BertForSequenceClassification, and its head, by the last part of their names.
LINEAR, HEAD = {"query", "key", "value", "dense"}, "classifier"
TRAINING = [
    "--task=rotten_tomatoes",
    "--max_train_samples=512",
    "--max_eval_samples=64",
    "--adapters=0.5",
    "--max_steps=30",
]


def main() -> None:
    """Train, read with both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel
    read_vllm.prepare(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        weightlora(["train", *TRAINING, "--output_dir", temporary])
        adapter = Path(temporary) / "adapter"
        code = weightlora(["check", str(adapter), "--for", "vllm"])
        found, head = by_vllm(adapter)
        wanted, own = by_peft(adapter)
    error = relative_error(found, wanted)
    print(f"check {code}; {len(found)} sites, wrong by {error:.2g}; head equal: {all(map(torch.equal, head, own))}")


def by_vllm(adapter: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """ΔW of each site, and weight and bias of the head, as vLLM loads them."""
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    helper = PEFTHelper.from_local_dir(str(adapter), 512)
    helper.validate_legal(SimpleNamespace(max_lora_rank=16))
    model = LoRAModel.from_local_checkpoint(
        str(adapter), {*LINEAR, HEAD}, helper, device="cpu", dtype=torch.float32, model_vocab_size=30522
    )
    head = model.modules_to_save[HEAD]
    updates = {name: own.lora_b.double() @ own.lora_a.double() * own.scaling for name, own in model.loras.items()}
    return updates, [head.weight, head.bias]


@torch.no_grad()
def by_peft(adapter: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The same, in PEFT."""
    base = AutoModelForSequenceClassification.from_pretrained(str(minilm()), num_labels=2)
    model = PeftModel.from_pretrained(base, adapter).get_base_model()
    updates = {
        name: module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    head = model.classifier.modules_to_save["default"]
    return updates, [head.weight, head.bias]


if __name__ == "__main__":
    main()
