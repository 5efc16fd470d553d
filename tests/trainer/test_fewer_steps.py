"""Fewer steps: all sites for a part of the time, or the same optimizer steps from fewer, larger batches."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest import TestCase

import pytest
import torch
import yaml
from peft import LoraConfig
from selecting import fingerprint
from transformers import Trainer, TrainingArguments

import weightlora
from weightlora.cli import main
from weightlora.cost.estimate import plain_lora
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.trainer.attach import adopt
from weightlora.trainer.batch_size import Batch, fitting, grown_batch, require_growable, use_batch

# -- ``time`` alone: the trainer takes so many steps, and no batch is read -------------------------------------------


class Unread:
    """Rows that must not be read."""

    def __len__(self):
        return 24

    def __getitem__(self, place):
        raise AssertionError("a row was read")


@pytest.fixture
def plan(make_tiny):
    """All four sites, for 0.57 of the steps."""
    return weightlora.select_for(make_tiny("selected"), time=0.57, progress=False)


def adopted(trainer, plan):
    """The lines that are logged while the trainer gets the plan, whatever handlers other tests have left."""
    with TestCase().assertLogs("weightlora.trainer.attach") as log:
        adopt(trainer, plan, seed=0)
    return [record.getMessage() for record in log.records]


def test_the_trainer_takes_the_plans_share_of_its_steps(make_tiny, plan):
    trainer = make_tiny(max_steps=10, logging_steps=1, logging_strategy="steps")
    assert adopted(trainer, plan) == ["the plan trains 5 of 10 steps (max_steps)"]
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 5
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2 * (5 - i) / 5 for i in range(5)])  # the schedule ends with them


def test_epochs_become_steps_as_well(make_tiny, plan):
    """24 rows by two are twelve steps an epoch: 0.57 of 24 are 13."""
    trainer = make_tiny(max_steps=-1, num_train_epochs=2)
    [line] = adopted(trainer, plan)
    hint = "a store (store=True, --store_frozen) weighs fewer layers, too"
    assert line == f"the plan trains 13 of 24 steps (max_steps); {hint}"
    trainer.train()
    assert trainer.state.global_step == 13


def test_the_share_is_the_decimal_that_was_written(make_tiny):
    """0.29 of 100 steps are 29, though 0.29 · 100 is 28.999999999999996 in floating point."""
    trainer = make_tiny(max_steps=100)
    weightlora.select_for(trainer, time=0.29, progress=False)
    assert trainer.args.max_steps == 29 == int(0.29 * 100) + 1


def test_all_of_the_time_is_plain_lora(make_tiny):
    trainer = make_tiny(max_steps=10)
    plan = weightlora.select_for(trainer, time=1.0, progress=False)
    assert ([*plan.ranks.values()], trainer.args.max_steps) == ([4] * 4, 10)
    assert "of the steps" not in str(plan)


def test_a_whole_plan_leaves_the_steps_alone(make_tiny, plan):
    trainer = make_tiny(max_steps=10)
    with TestCase().assertNoLogs("weightlora.trainer.attach"):
        adopt(trainer, replace(plan, options={}), seed=0)
    assert trainer.args.max_steps == 10


def test_a_second_start_in_the_folder_takes_as_many(make_tiny):
    """The share is taken of the trainer's own number of steps once more, not of 5."""
    for _ in range(2):
        trainer = make_tiny(max_steps=10)
        found = weightlora.select_for(trainer, time=0.57, progress=False)
        assert (found.step_share, trainer.args.max_steps) == (0.57, 5)


@pytest.mark.parametrize(("parameters", "rank", "alpha"), [(None, 4, 8), (0.25, 1, 2)])
def test_all_sites_are_kept_and_no_row_is_read(make_tiny, parameters, rank, alpha):
    """With a quarter of the parameters rank 1 of 4, and alpha/4."""
    trainer = make_tiny(rows=Unread(), max_steps=10)
    plan = weightlora.select_for(trainer, time=0.6, parameters=parameters, progress=False)
    assert [(e.r, e.alpha) for e in plan.entries] == [(rank, alpha)] * 4
    assert (plan.rule, plan.spent, trainer.args.max_steps) == ("uniform", {}, 6)
    assert "train     60 % of the steps" in str(plan)
    own, lora = plan.alternatives[:2]
    assert (own.step_time, own.training_time, lora.training_time) == (1.0, 0.6, 1.0)
    assert not [row for row in plan.alternatives if row.name.endswith("of the steps")]  # this plan itself
    assert AdapterPlan.load(Path(trainer.args.output_dir) / "plan.json").step_share == 0.6


@pytest.mark.parametrize("given", [{"rule": "first_order", "steps": 3}, {"adapters": 3}])
def test_with_a_rule_or_another_limit_the_sites_take_the_time(make_tiny, given):
    """Every row is read by the scoring, and the steps are left alone."""
    trainer = make_tiny(max_steps=100)
    plan = weightlora.select_for(trainer, time=0.99, progress=False, **given)
    assert (plan.step_share, trainer.args.max_steps) == (1.0, 100)
    assert plan.spent["scoring_steps"] > 0
    assert 0 < plan.options["step_time"] <= 0.99  # measured; LoRA on all sites takes 1
    assert 1 <= len(plan.names) < 4
    assert "takes as long: better on one task of two" in str(plan)


# -- ``memory`` alone: fewer rows at once, more accumulation ----------------------------------------------------------


def test_memory_alone_takes_fewer_rows_at_once_and_the_training_stays(make_tiny):
    trained = {}

    def start(name, memory=None, rows=8):
        trainer = make_tiny(name, per_device_train_batch_size=rows, max_steps=3)
        plan = None if memory is None else weightlora.select_for(trainer, memory=memory, progress=False)
        return trainer, plan

    def train(name, trainer):
        trainer.train()
        trained[name] = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}

    whole, fits = start("whole", "1GB")
    assert (fits.batch_parts, batch_of(whole.args.to_dict())) == (1, (8, 1))
    limit = f"{(fits.options['lora_peak_bytes'] - 1) / 1000}kB"
    parts, plan = start("parts", limit)
    assert (plan.batch_parts, batch_of(parts.args.to_dict())) == (2, (4, 2))
    assert plan.ranks == fits.ranks
    assert plan.options["peak_bytes"] < fits.options["peak_bytes"]
    train("whole", whole)
    train("parts", parts)
    train("other", start("other", "1GB", rows=4)[0])
    assert parts.state.global_step == 3
    assert all(value.allclose(trained["parts"][key], atol=1e-6) for key, value in trained["whole"].items())
    assert not all(value.allclose(trained["other"][key], atol=1e-4) for key, value in trained["whole"].items())

    again, stored = start("parts", limit)  # a second start takes the stored plan
    assert (stored, batch_of(again.args.to_dict())) == (plan, (4, 2))
    odd = make_tiny("odd", per_device_train_batch_size=5)
    with pytest.warns(WeightLoraWarning, match="per_device_train_batch_size=5: the plan fits into memory with 1/2"):
        adopt(odd, plan, seed=0)
    assert batch_of(odd.args.to_dict()) == (5, 1)


# -- --grow_batch, within the bytes of plain LoRA --------------------------------------------------------------------

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
