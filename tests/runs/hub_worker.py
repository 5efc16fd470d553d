"""A user's process whose hub is the one that HF_ENDPOINT names; the variable counts when huggingface_hub is imported.

python hub_worker.py BASE FOLDER
"""

import json
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from small_run import words
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import weightlora
from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan


def by_the_command(base, folder):
    """Push what ``weightlora train`` makes; the hub fails at first. Return the exit codes and what was said."""
    command = words(base, folder / "sentiment", push_to_hub=True, hub_strategy="end", save_total_limit=1)
    said = StringIO()
    with redirect_stderr(said):
        codes = [main(command)]
        unfinished = not (folder / "sentiment" / "results.json").exists()
        codes.append(main(command))
    return {"codes": codes, "said": said.getvalue(), "unfinished": unfinished}


def by_a_script(base, folder):
    """Push with the Trainer of a script that calls ``select_for``, with the plan's own folder, and with PEFT alone."""
    rows = [{"input_ids": [2, i + 5, 3], "labels": i % 2} for i in range(16)]
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder / "script"), max_steps=2, push_to_hub=True, **quiet)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    trainer = Trainer(model, arguments, train_dataset=rows)
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    plan = weightlora.select_for(trainer, lora=lora, adapters=2, steps=2)
    trainer.train()
    trainer.push_to_hub()
    plan.save_adapter(trainer.model, folder / "card")
    api = HfApi()
    api.create_repo("me/card")
    api.upload_folder(repo_id="me/card", folder_path=folder / "card")
    trainer.model.push_to_hub("me/bare")


@torch.no_grad()
def loaded(base, name):
    """What a stranger gets from the hub: logits and plan."""
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), name).eval()
    plan = AdapterPlan.load(hf_hub_download(name, "plan.json"))
    plan.check(model)
    return model(input_ids=torch.tensor([[2, 7, 9, 3]])).logits, plan


def run():
    base, folder = map(Path, sys.argv[1:])
    told = by_the_command(base, folder)
    by_a_script(base, folder)
    for name, own in (("sentiment", "sentiment/adapter"), ("script", "script"), ("card", "card")):
        there, plan = loaded(base, f"me/{name}")
        model = AutoModelForSequenceClassification.from_pretrained(base)
        here = PeftModel.from_pretrained(model, folder / own).eval()
        with torch.no_grad():
            tensors = {"hub": there, "here": here(input_ids=torch.tensor([[2, 7, 9, 3]])).logits}
            with here.disable_adapter():
                tensors["base"] = here(input_ids=torch.tensor([[2, 7, 9, 3]])).logits
        save_file(tensors, folder / f"{name}.safetensors")
        plan.save(folder / f"{name}.json")
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    run()
