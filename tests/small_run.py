"""A run of ``weightlora train`` in a fraction of a second: a random encoder of two narrow layers, sixteen rows."""

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

TRAINING = {
    "task": "text_classification",
    "keep": 5,
    "steps": 2,
    "rule_options": "head_steps=0",
    "lora_dropout": 0.2,  # so that random numbers decide the result, too
    "max_seq_length": 16,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def write_base(folder, tokenizer):
    """Write the encoder with its tokenizer, and the rows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = "".join(f"a {word} film number {i},{word}\n" for i in range(8) for word in ("good", "bad"))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    return folder


def words(base, output, *more, **changed):
    """The command; what is None is left out."""
    files = {"model_name_or_path": base, "train_file": base / "rows.csv", "validation_file": base / "rows.csv"}
    options = {**files, **TRAINING, **changed, "output_dir": output}
    return ["train", *(f"--{name}={value}" for name, value in options.items() if value is not None), *more]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
