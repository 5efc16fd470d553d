"""An adapter of the embedded SmolLM2, exported with llama.cpp's converter: the same words from PEFT and llama.cpp.

    python benchmarks/readers/smollm2.py llama.cpp/convert_lora_to_gguf.py

The base is the embedded Q4_1 file. For PEFT its weights are dequantised to float32; llama.cpp gets those numbers as a
GGUF file in float32, and the quantised file as a second run. Prints the words of each, with the unexported adapter as
the control.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from read_llama_cpp import complete
from transformers import AutoTokenizer

from weightlora.serving.base_model import write_config
from weightlora.serving.export import export_adapter
from weightlora.tasks.embedded import smollm2
from weightlora.tasks.pretrained import load_pretrained

FOLDER, FILE = str(smollm2().parent), smollm2().name
WORDS = 20
TEXT = "The three most important things about a good recipe are"


def main() -> None:
    """Train a few steps, export, and let both answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converter", type=Path)
    converter: Path = parser.parse_args().converter
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tokenizer, adapter = _train(work)
        prompt: list[int] = tokenizer(TEXT)["input_ids"]
        model = PeftModel.from_pretrained(_base(), adapter).eval()
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=WORDS, do_sample=False, eos_token_id=None)
        wanted = answer[0, len(prompt) :].tolist()
        with model.disable_adapter():
            without = model.generate(torch.tensor([prompt]), max_new_tokens=WORDS, do_sample=False, eos_token_id=None)
        print("base alone", tokenizer.decode(without[0, len(prompt) :].tolist()))
        print("PEFT      ", tokenizer.decode(wanted))
        quantised = Path(FOLDER) / FILE
        plain = _dequantised(quantised, work / "f32.gguf")
        out = export_adapter(adapter, "llama.cpp", work / "out", base="embedded/smollm2", converter=converter)
        raw = work / "raw.gguf"
        known = write_config("embedded/smollm2", "CAUSAL_LM", work / "config")
        options = ["--base", str(known), "--outfile", str(raw), "--outtype", "f32"]
        subprocess.run([sys.executable, str(converter), str(adapter), *options], check=True, capture_output=True)
        for name, file, lora in (
            ("float32", plain, out / "adapter.gguf"),
            ("Q4_1", quantised, out / "adapter.gguf"),
            ("unexported", plain, raw),
        ):
            said = complete(file, lora, prompt, WORDS)["choices"][0]["logprobs"]["content"]
            words = [entry["id"] for entry in said]
            equal = sum(a == b for a, b in zip(words, wanted, strict=False))
            print(f"llama.cpp, {name}: {equal} of {WORDS} words equal: {tokenizer.decode(words)}")


def _base() -> Any:
    return load_pretrained("AutoModelForCausalLM", FOLDER, seed=0, gguf_file=FILE, dtype=torch.float32)


def _train(work: Path) -> tuple[Any, Path]:
    """Train rsLoRA with unequal ranks for a few steps on one sentence."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
    torch.manual_seed(0)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"v_proj": 4},
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=list(range(0, 30, 2)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(_base(), lora)
    rows = torch.tensor([tokenizer(TEXT + " patience, salt and a very sharp knife, said the captain.")["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(8):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(work / "adapter"))
    return tokenizer, work / "adapter"


def _dequantised(source: Path, target: Path) -> Path:
    """The same file with all tensors in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


if __name__ == "__main__":
    main()
