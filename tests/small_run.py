"""A run of ``weightlora train`` in a fraction of a second: a random encoder of two narrow layers, sixteen rows."""

import shutil

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from weightlora.methods import METHODS, entry_of, options_of
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train

TRAINING = {
    "task": "text_classification",
    "adapters": 5,
    "steps": 2,
    "rule": "first_order",
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


def interrupted(whole, run, *, after=4):
    """Copy a run as it was after a step."""
    shutil.copytree(whole, run)
    for gone in ("results.json", "heatmap.png"):
        (run / gone).unlink(missing_ok=True)
    shutil.rmtree(run / "adapter")
    for step in (2, 4, 6):
        if step > after:
            shutil.rmtree(run / f"checkpoint-{step}", ignore_errors=True)
    return run


def methods_that_train(what):
    return [entry.name for entry in METHODS if entry.trains == what]


def resumes(base, folder, method):
    """Whether a run of a method resumes to the same adapter: in the middle of its training, and at its end."""
    known = options_of(method)
    short = {"deltaT": 1, "tfinal": 1, "interval": 1, "rounds": 2, "validation": 2}
    short |= {} if "rule" in known else {"steps": 2}
    short |= {"init_r": 12} if method == "pruned_lora" else {}  # from 12 to 8 in the four steps
    own = [f"{key}={value}" for key, value in short.items() if key in known]
    more = ["--method_options", *own] if own else []
    limit = 0.5 if "adapters" in known else None
    small = {
        "method": method,
        "adapters": limit,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "max_eval_samples": 2,
        **(dict.fromkeys(("rule", "rule_options")) if entry_of(method).begins_training else {}),  # the paper's own
    }

    def run(output):
        train(read_recipe(words=words(base, output, *more, **small)[1:]))
        return adapter(output)

    finished = run(folder / "finished")
    ends = [run(interrupted(folder / "finished", folder / str(after), after=after)) for after in (2, 4)]
    return all(same(end, finished) for end in ends)
