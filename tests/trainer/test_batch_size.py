"""--grow_batch: the same optimizer steps from fewer, larger batches, within the bytes of plain LoRA."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
import yaml
from peft import LoraConfig
from selecting import fingerprint
from transformers import Trainer, TrainingArguments

from weightlora.cli import main
from weightlora.cost.estimate import plain_lora
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.sites import find_sites
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.trainer.batch_size import Batch, fitting, grown_batch, require_growable, use_batch

ROWS, ACCUMULATION = 8, 4
OPTIONS = {
    "task": "rotten_tomatoes",
    "max_train_samples": 64,
    "max_eval_samples": 8,
    "max_seq_length": 16,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": ACCUMULATION,
    "learning_rate": 2e-3,
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """MiniLM without its own dropout, whose random numbers would depend on the shape of the batch."""
    folder = tmp_path_factory.mktemp("steady")
    for path in minilm_folder().iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    config = json.loads((minilm_folder() / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def plan_from(minilm, tmp_path):
    """Write the plan that keeps the sites of MiniLM's six layers from one up, and return where it is."""
    lora = LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS")
    sites = find_sites(minilm, lora).sites

    def write(layer):
        kept = [site.name for site in sites if int(site.block.rpartition(".")[2]) >= layer]
        make_plan(sites, lora, kept).save(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    return write


def run(folder, model, plan, **changed):
    options = {**OPTIONS, "model_name_or_path": model, "plan": plan, **changed, "output_dir": folder}
    return train(read_recipe(words=[f"--{name}={value}" for name, value in options.items()]))


def batch_of(results):
    return results["per_device_train_batch_size"], results["gradient_accumulation_steps"]


def losses(results):
    return torch.tensor([loss for _, loss in results["losses"]])


@pytest.mark.slow
def test_the_batch_grows_as_far_as_plain_lora_reached_and_the_losses_stay(steady, plan_from, tmp_path):
    plan, folder = plan_from(3), tmp_path / "large"
    small = run(tmp_path / "small", steady, plan)
    large = run(folder, steady, plan, grow_batch=True)
    assert (batch_of(small), batch_of(large)) == ((8, 4), (16, 2))
    assert small["steps"] == large["steps"] == 2
    torch.testing.assert_close(losses(large), losses(small), rtol=1e-5, atol=0)
    assert yaml.safe_load((folder / "config.yaml").read_text())["gradient_accumulation_steps"] == 4  # what was asked
    other = run(tmp_path / "other", steady, plan, gradient_accumulation_steps=2)
    assert not torch.allclose(losses(other), losses(small), rtol=1e-5, atol=0)  # the control: another effective batch

    # A stopped run goes on with the batch that is stored, whatever would be found now.
    assert json.loads((folder / "batch.json").read_text()) == {"rows": 16, "accumulation": 2}
    (folder / "batch.json").write_text('{"rows": 32, "accumulation": 1}')
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "checkpoint-2")
    resumed = run(folder, steady, plan, grow_batch=True)
    assert batch_of(resumed) == (32, 1)
    torch.testing.assert_close(losses(resumed), losses(small), rtol=1e-5, atol=0)


def held(base, trainer, variant, rows):
    """Bytes that a step of so many rows holds at the end of its forward pass, counted by hooks, and the trained ones.

    Trained numbers count four times: with their gradients and AdamW's two moments.
    """
    model = variant.attach(deepcopy(base)).train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        tensor = tensor.detach()  # a kept output would keep its graph alive, and the graph the output
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    del loss
    return 4 * trained + sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def trainer_on(base, plan, folder):
    """A trainer of 64 rows of 16 tokens on a copy of the model with the plan's adapters."""
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8, gradient_accumulation_steps=8, use_cpu=True, report_to="none"
    )
    row = {"input_ids": list(range(1000, 1016)), "attention_mask": [1] * 16, "labels": 1}
    return Trainer(plan.attach(deepcopy(base)), arguments, train_dataset=[row] * 64)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("layer", "rows"), [(3, 16), (5, 32)])
def test_what_is_chosen_fits_and_the_next_larger_does_not(minilm, plan_from, tmp_path, layer, rows):
    plan = AdapterPlan.load(plan_from(layer))
    trainer = trainer_on(minilm, plan, tmp_path)
    before = fingerprint(trainer.model)
    assert grown_batch(trainer, plan) == Batch(rows, 64 // rows)
    assert fingerprint(trainer.model) == before
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (8, 8)
    limit = held(minilm, trainer, plain_lora(plan), 8)
    assert held(minilm, trainer, plan, rows) <= limit < held(minilm, trainer, plan, 2 * rows)


def test_what_runs_out_of_memory_does_not_fit():
    def fits(batch):
        if batch.rows > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return True

    assert fitting(Batch(8, 4), fits) == Batch(16, 2)
    assert fitting(Batch(8, 4), lambda _: False) == Batch(8, 4)

    def broken(_):
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        fitting(Batch(8, 4), broken)


@pytest.mark.slow
def test_a_batch_that_cannot_grow_is_told_once(minilm, plan_from, tmp_path):
    everything = plain_lora(AdapterPlan.load(plan_from(5)))
    trainer = trainer_on(minilm, everything, tmp_path)
    with pytest.warns(WeightLoraWarning, match="no batch larger than 8 fits") as told:
        assert grown_batch(trainer, everything) == Batch(8, 8)
    assert len([one for one in told if one.category is WeightLoraWarning]) == 1
    use_batch(trainer, Batch(8, 1))
    with pytest.warns(WeightLoraWarning, match="gradient_accumulation_steps is 1"):
        assert grown_batch(trainer, everything) == Batch(8, 1)


def test_settings_that_decide_otherwise_are_refused_before_anything_is_written(minilm, plan_from, tmp_path, capsys):
    options = {**OPTIONS, "gradient_checkpointing": True, "output_dir": tmp_path / "out"}
    assert main(["train", *(f"--{name}={value}" for name, value in options.items()), "--grow_batch"]) == 2
    assert "give gradient_checkpointing: false" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    trainer = trainer_on(minilm, AdapterPlan.load(plan_from(5)), tmp_path)
    require_growable(trainer)
    trainer.args.auto_find_batch_size = True
    with pytest.raises(OptionError, match="auto_find_batch_size both choose the batch"):
        require_growable(trainer)
