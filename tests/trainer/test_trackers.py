"""Trackers get the plan once, through the trainer's own ``report_to``."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import weightlora
from weightlora.plan.plan import AdapterPlan
from weightlora.trainer.guard import plan_numbers


def train(folder, report_to, steps=4, resume=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
        base = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
    rows = [{"input_ids": [i, i + 1, i + 2], "labels": i % 2} for i in range(16)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    trainer = Trainer(model, arguments, train_dataset=rows)
    plan = weightlora.select_for(trainer, adapters=2, steps=2)
    trainer.train(resume_from_checkpoint=resume)
    return plan, trainer


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        found.append(events)
    return found


@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
def test_tensorboard_shows_numbers_and_sites_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    plan, _ = train(tmp_path / "run", "tensorboard")
    (events,) = tensorboard(tmp_path / "logs")
    for name, value in plan_numbers(plan).items():
        (event,) = events.Scalars(f"train/{name}")
        assert (event.step, event.value) == (0, pytest.approx(value))
    (text,) = events.Tensors("plan/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[0].removeprefix("| ") for line in shown.splitlines()[2:]] == [
        entry.site.name for entry in plan.entries
    ]
    # A resumed run goes on with its curves; the plan is known.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "again"))
    train(tmp_path / "run", "tensorboard", steps=6, resume=True)
    (again,) = tensorboard(tmp_path / "again")
    assert not [tag for tag in again.Tags()["scalars"] if "plan" in tag]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
def test_wandb_keeps_the_plan_as_an_artefact(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    plan, _ = train(tmp_path / "run", "wandb")
    wandb.finish()
    kept = [file for file in tmp_path.rglob("*") if is_plan(file, tmp_path / "run")]
    assert kept
    assert AdapterPlan.load(kept[0]).ranks == plan.ranks


def is_plan(file, run):
    """A copy of the plan that W&B made outside of the run's folder."""
    return file.is_file() and run not in file.parents and file.read_bytes() == (run / "plan.json").read_bytes()


@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
def test_without_trackers_nothing_is_logged(tmp_path):
    _, trainer = train(tmp_path / "run", "none")
    assert not [entry for entry in trainer.state.log_history if any("plan" in key for key in entry)]
