"""One process, or one of several, that trains a tiny Llama: ddp_worker.py OUTPUT store, or the name of a method."""

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weightlora.trainer.attach import method_for
from weightlora.trainer.store import store_frozen

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}

torch.set_num_threads(1)
output, what = Path(sys.argv[1]), sys.argv[2]
targets = r".*layers\.[23]\..*q_proj" if what == "store" else "all-linear"
torch.manual_seed(0)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2, target_modules=targets))
tokens = [[3 + (7 * i + j * j) % 29 for j in range(6)] for i in range(16)]
arguments = TrainingArguments(
    str(output / "run"),
    num_train_epochs=3,
    per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
    train_sampling_strategy="sequential",
    learning_rate=1e-2,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    save_strategy="no",
)
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
if what == "store":
    store = store_frozen(trainer, folder=output / "states")
    trainer.train()
    assert store.hits == 2 * store.misses > 0
else:
    method_for(trainer, what, steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
if trainer.is_world_process_zero():
    trained = {n.removeprefix("module."): p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(trained, output / "trained.safetensors")
