"""Whether ``memory=`` holds: the peak asked for, the one counted, and that of a real training afterwards.

    python benchmarks/memory_limit.py            # ten configurations on the CPU; JSON lines, then a Markdown table

For each configuration plain LoRA and the cheapest single adapter are counted, and the limit is set between them. Then
``select`` makes a plan within the limit, and the plan is trained for five steps. The measured peak is that of torch's
CPU allocator, as its profiler records every allocation, in the third to fifth step with the weights and AdamW's state.
All runs use one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile, record_function

import weightlora
from weightlora.model.checkpointing import remove_input_hooks
from weightlora.tasks.embedded import minilm, smollm2

_TEXT: dict[str, Any] = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
_LLAMA = _TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {"vocab_size": 2000, "n_embd": 128, "n_layer": 4, "n_head": 4}
_T5: dict[str, Any] = {"vocab_size": 2000, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3}
_T5_HEADS: dict[str, Any] = {"num_heads": 4, "decoder_start_token_id": 0}
_IMAGES: dict[str, Any] = {"image_size": 64, "patch_size": 8, "num_labels": 10, "num_attention_heads": 4}
_VIT = {key: value for key, value in _TEXT.items() if key != "vocab_size"} | _IMAGES


@dataclass(frozen=True)
class Configuration:
    """A model and how it is trained."""

    model: Literal["MiniLM", "SmolLM2", "Llama", "GPT-2", "T5", "ViT"]
    rows: int = 8
    length: int = 64
    """Tokens of a row."""
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    fast: Literal["input", "rank"] | None = None
    bits: Literal[4] | None = None
    share: float = 0.5
    """Where the limit is between one adapter (0) and plain LoRA (1)."""

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.length}", str(self.dtype).removeprefix("torch.")]
        words += ["checkpointing"] if self.checkpointing else []
        words += [f"fast step ({self.fast})"] if self.fast else []
        return ", ".join(words + ([f"{self.bits} bit"] if self.bits else []))


TEN = (
    Configuration("MiniLM"),
    Configuration("MiniLM", rows=16, checkpointing=True, share=0.8),
    Configuration("MiniLM", rows=4, fast="input", share=0.3),
    Configuration("SmolLM2", rows=2, length=48),
    Configuration("SmolLM2", rows=4, length=48, checkpointing=True, dtype=torch.bfloat16, share=0.8),
    Configuration("Llama", dtype=torch.bfloat16),
    Configuration("Llama", rows=4, bits=4, checkpointing=True, share=0.7),
    Configuration("GPT-2", rows=2, share=0.4),
    Configuration("T5", share=0.6),
    Configuration("ViT", rows=32, share=0.3),
)


def main() -> None:
    """Measure the configurations asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(TEN)), help="numbers of configurations")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = [measured(TEN[number]) for number in parser.parse_args().only]
    print("\n| model | training | sites | asked MB | counted MB | measured MB | count s | selection s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        sizes = " | ".join(f"{row[key] / 1e6:,.3f}" for key in ("asked", "counted", "measured"))
        seconds = f"{row['count_seconds']:.1f} | {row['seconds']:.1f}"
        print(f"| {row['model']} | {row['training']} | {row['kept']}/{row['sites']} | {sizes} | {seconds} |")
    assert all(row["measured"] <= row["asked"] for row in rows), "a limit did not hold"


def measured(configuration: Configuration) -> dict[str, Any]:
    """Select within the limit, train, and print both peaks as a JSON line."""
    model, task = _loaded(configuration)
    lora = LoraConfig(r=8, lora_dropout=0.05, task_type=task)
    batch = _batch(configuration)
    options: dict[str, Any] = {"lora": lora, "steps": 2, "rule": "first_order", "progress": False}
    options["fast"] = configuration.fast
    start = time.perf_counter()
    whole = weightlora.select(model, [batch] * 2, memory="1000GB", **options)
    count_seconds = time.perf_counter() - start
    single = weightlora.select(model, [batch] * 2, memory="1000GB", adapters=1, **options)
    least, most = single.options["peak_bytes"], whole.options["peak_bytes"]
    asked = int(least + configuration.share * (most - least)) // 1000 * 1000
    start = time.perf_counter()
    plan = weightlora.select(model, [batch] * 2, memory=f"{asked // 1000}kB", **options)
    row = {
        "model": configuration.model,
        "training": str(configuration),
        "sites": len(whole.names),
        "kept": len(plan.names),
        "lora": most,
        "one": least,
        "asked": asked,
        "counted": plan.options["peak_bytes"],
        "seconds": time.perf_counter() - start,
        "count_seconds": count_seconds,
        "measured": _trained(configuration, model, plan, batch),
    }
    print(json.dumps(row), flush=True)
    return row


def _trained(configuration: Configuration, model: Any, plan: weightlora.AdapterPlan, batch: Any) -> int:
    """The peak of the allocator in the third to fifth step of a training."""
    memory: Any
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        batch = {key: value.clone() for key, value in batch.items()}
        planned: Any = plan.attach(copy.deepcopy(model)).train()
        if configuration.fast:
            weightlora.enable_fast_lora(planned, configuration.fast)
        optimizer = torch.optim.AdamW([p for p in planned.parameters() if p.requires_grad], lr=1e-3, fused=True)
        for _ in range(2):
            _step(planned, batch, optimizer)
        with record_function("steady steps"):  # the most of three: the profiler loses an event now and then
            for _ in range(3):
                _step(planned, batch, optimizer)
    events = sorted(memory.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "steady steps")
    changes = [event for event in events if event.name() == "[memory]"]
    there = accumulate(event.nbytes() for event in changes)
    return max(n for n, event in zip(there, changes, strict=True) if event.start_ns() >= start)


def _step(model: Any, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _loaded(configuration: Configuration) -> tuple[Any, str | None]:
    """The model in training mode with checkpointing, and PEFT's task type."""
    torch.manual_seed(0)
    name, task = configuration.model, "CAUSAL_LM"
    model: Any
    if name == "MiniLM":
        task = "SEQ_CLS"
        model = transformers.AutoModelForSequenceClassification.from_pretrained(str(minilm()), num_labels=2)
    elif name == "SmolLM2":
        file = smollm2()
        model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    elif name == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))
    elif name == "GPT-2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2))
    elif name == "T5":
        task, model = "SEQ_2_SEQ_LM", transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, **_T5_HEADS))
    else:
        task, model = None, transformers.ViTForImageClassification(transformers.ViTConfig(**_VIT))
    model = model.to(configuration.dtype)
    if configuration.bits:
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, quantization_config=settings, dtype=configuration.dtype)
    model.train()
    if configuration.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        remove_input_hooks(model)
    return model, task


def _batch(configuration: Configuration) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows, length = configuration.rows, configuration.length
    if configuration.model == "ViT":
        pixels = torch.randn((rows, 3, 64, 64), generator=draw).to(configuration.dtype)
        return {"pixel_values": pixels, "labels": torch.randint(10, (rows,), generator=draw)}
    tokens = torch.randint(5, 1000, (rows, length), generator=draw)
    mask = torch.ones_like(tokens)
    mask[0, -length // 4 :] = 0
    labels = torch.randint(2, (rows,), generator=draw) if configuration.model == "MiniLM" else tokens.clone()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    main()
