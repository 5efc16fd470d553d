"""A real encoder with real sentences and a trainer on a tiny Llama, small and quick enough for every test."""

import gc
import os
from copy import deepcopy

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_models import tiny_llama, tiny_rows
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, Trainer, TrainingArguments

from weightlora.tasks.classification import encode, load_classifier, shuffled_batches
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.tasks.embedded import rotten_tomatoes

# Models this small gain nothing from threads, which wait long for each other where other work runs beside the tests.
# Processes that the tests start have one, too: on some processors MKL's sums differ in the last bit with two.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytest.register_assert_rewrite("conformance")

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}


@pytest.fixture(scope="session", autouse=True)
def _little_garbage():
    """The Trainer collects garbage after each training; what the imports left need not be looked at every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(minilm_folder()))


@pytest.fixture(scope="session")
def review_batches(tokenizer):
    """Six batches of eight film reviews with labels, at most 24 tokens each."""
    rows = encode(tokenizer, rotten_tomatoes(train=64, test=64).train, max_length=24)
    return shuffled_batches(rows, DataCollatorWithPadding(tokenizer), batch_size=8, count=6, seed=0)


@pytest.fixture(scope="session")
def _pristine_minilm():
    return load_classifier(minilm_folder(), labels=2, seed=0)


@pytest.fixture
def minilm(_pristine_minilm) -> PreTrainedModel:
    """MiniLM with a fresh head for two classes, in eval mode; each test has its own copy."""
    return deepcopy(_pristine_minilm)


@pytest.fixture(params=[8, 4], ids=["8bit", "4bit"])
def quantised_net(request) -> nn.Module:
    """Two bitsandbytes layers with a tanh between them, marked as transformers does it for PEFT."""
    torch.manual_seed(0)

    def linear():
        if request.param == 8:
            return bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        return bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")

    net = nn.Sequential(linear(), nn.Tanh(), linear()).to("cpu")  # .to() is what quantises
    setattr(net, f"is_loaded_in_{request.param}bit", True)
    return net


@pytest.fixture
def make_tiny(tmp_path):
    """Makes the same trainer on a tiny Llama each time: rank 4 on q and v of two layers, four candidates."""

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
