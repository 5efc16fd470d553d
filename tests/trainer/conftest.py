"""A trainer on a tiny random Llama, with every part of it open to change."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama, tiny_rows
from transformers import Trainer, TrainingArguments

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}


@pytest.fixture
def make_tiny(tmp_path):
    """Makes the same trainer each time: rank 4 on q and v of two layers, four candidates."""

    def make(folder="run", *, lora=None, model=None, rows=None, wrapped=True, kind=Trainer, **arguments):
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        base = tiny_llama() if model is None else model
        torch.manual_seed(1)
        given = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3, **arguments}
        return kind(
            get_peft_model(base, LoraConfig(**{**fields, **(lora or {})})) if wrapped else base,
            TrainingArguments(str(tmp_path / folder), **{**QUIET, **given}),
            train_dataset=tiny_rows() if rows is None else rows,
        )

    return make
