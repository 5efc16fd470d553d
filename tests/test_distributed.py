"""Two real processes: they choose and train what one process does on the same rows, copied (DDP) or sharded (FSDP2)."""

import csv
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from distributed_worker import (
    LIMITS,
    ROWS,
    RULES,
    recipe,
    shares,
    small_batches,
    small_model,
    small_plan,
    token_trainer,
)
from peft import PeftModel
from safetensors.torch import load_file

from weightlora.cli import main
from weightlora.model.layers import lora_layers
from weightlora.plan.plan import AdapterPlan
from weightlora.runs.train import train
from weightlora.tasks.classification import load_classifier
from weightlora.tasks.embedded import rotten_tomatoes
from weightlora.trainer.attach import select_for

#: Halves of a batch are summed in another order than the whole. That moves an fp32 sum by some 1e-7 of its terms, which
#: partly cancel: 4e-6 of the largest number of a matrix was seen, and 3e-7 of a score.
ROUNDING = 1e-4
FIRST = ("ddp", "fsdp_plan")  # the runs that `two` trains


@pytest.fixture(scope="module")
def folder(_pristine_minilm, tokenizer, tmp_path_factory):
    """Two layers of MiniLM without dropout, whose masks would differ with the number of processes, and 80 reviews."""
    path = tmp_path_factory.mktemp("distributed")
    base = deepcopy(_pristine_minilm.bert)
    base.encoder.layer = base.encoder.layer[:2]
    base.config.update({"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    reviews = rotten_tomatoes(train=64, test=64)
    for name, rows in (("train", reviews.train), ("validation", reviews.test[:16])):
        with (path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return path


def two_processes(folder, part):
    """The folder with what two processes have left there."""
    worker = str(Path(__file__).parent / "distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, part, str(folder)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return two_processes(folder, "first")


@pytest.fixture(scope="module")
def more(two):
    """What takes longer; `make test` does without it."""
    return two_processes(two, "second")


@pytest.fixture(scope="module")
def one(folder):
    """What one process trains on the same rows, and on half of them."""
    train(recipe(folder, "one", ROWS))
    train(recipe(folder, "half", ROWS // 2))
    return folder


def runs(*names):
    """``run`` with each of the names; what ``more`` trains is slow."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize("run", [name if name in FIRST else pytest.param(name, marks=slow) for name in names])


@pytest.fixture
def left(request, run):
    """The folder with what two processes have left in this run."""
    return request.getfixturevalue("two" if run in FIRST else "more")


def told(folder, part):
    """What each of the two processes said."""
    return [json.loads((folder / f"{part}-{process}.json").read_text()) for process in range(2)]


def distance(folder, run, other):
    """The largest difference between the adapters of two runs, matrix by matrix in units of its largest number."""
    a, b = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in (run, other))
    assert a.keys() == b.keys()
    assert any(tensor.any() for name, tensor in a.items() if "lora_B" in name)
    return max(((a[name] - b[name]).abs().max() / a[name].abs().max()).item() for name in a)


def assert_same_choice(plan, other):
    assert plan.ranks == other.ranks
    torch.testing.assert_close(torch.tensor(plan.history), torch.tensor(other.history), rtol=ROUNDING, atol=0)


def plan_of(folder, run):
    return AdapterPlan.load(folder / run / "plan.json")


# -- one plan --------------------------------------------------------------------------------------------------------


@runs("ddp", "fsdp")
def test_two_processes_choose_as_one_on_the_same_rows(one, left, run):
    assert_same_choice(plan_of(left, run), plan_of(one, "one"))
    planned = {name: r for name, r in plan_of(left, run).ranks.items() if r}
    assert [witness["ranks"] for witness in told(left, run)] == [planned, planned]
    with pytest.raises(AssertionError):  # negative control: half of the rows say something else
        assert_same_choice(plan_of(left, run), plan_of(one, "half"))


def test_two_processes_weigh_tokens_as_one(two, tmp_path):
    plan = select_for(token_trainer(tmp_path, "one", ROWS), steps=6)
    assert_same_choice(plan_of(two, "tokens"), plan)
    with pytest.raises(AssertionError):  # negative control: each process's mean over its own tokens
        assert_same_choice(plan_of(two, "tokens_apart"), plan)


@pytest.mark.parametrize("rule", RULES)
def test_a_sharded_model_gets_the_plan_of_a_whole_one(two, rule):
    first, second = (two / f"sharded-{rule}-{process}.plan" for process in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert_same_choice(AdapterPlan.load(first), small_plan(small_model(), small_batches(), rule))
    alone = small_plan(small_model(), shares(small_batches(), 0, 2), rule)
    with pytest.raises(AssertionError):  # negative control: what the first process would hear alone
        assert_same_choice(AdapterPlan.load(first), alone)


def test_a_sharded_model_may_have_adapters(two):
    plan = AdapterPlan.load(two / "sharded-peft-0.plan")
    assert_same_choice(plan, small_plan(small_model(), small_batches()))


def test_a_sharded_model_is_left_as_it_was(two):
    """Also after a scoring that failed between forward and backward pass, where FSDP2 holds gathered weights."""
    for afterwards, error in zip(told(two, "afterwards"), told(two, "not_finite"), strict=True):
        assert len(afterwards["losses"]) == len(RULES) + 2
        assert len(set(afterwards["losses"])) == 1
        assert afterwards["gathered"] == []
        assert "the loss is nan" in error


def test_processes_that_choose_differently_are_stopped(two):
    """Without the mean of the gradients each process hears its own rows: were this equal, so would all above be."""
    for error in told(two, "unaveraged"):
        assert "the choice differs between the 2 processes (2 different values)" in error


@pytest.mark.parametrize("limit", LIMITS)
def test_two_processes_spend_what_the_first_one_measured(two, limit):
    first, second = (two / f"limit-{limit}-{process}.plan" for process in range(2))
    assert first.read_bytes() == second.read_bytes()
    plan = AdapterPlan.load(first)
    found = plan.options["peak_bytes"] / 240_000 if limit == "memory" else plan.options["step_time"] / 0.9
    assert 0 < found <= 1


def test_a_process_that_measures_for_itself_is_stopped(two):
    """The second has half of the first one's rows, so that its bytes pay for more sites."""
    for error in told(two, "apart"):
        assert "the choice differs between the 2 processes (2 different values)" in error


# -- one adapter -----------------------------------------------------------------------------------------------------


@runs("ddp", "ddp_fast", "fsdp", "fsdp_plan", "fsdp_fast")
def test_two_processes_train_the_adapter_of_one(one, left, run):
    assert {witness["fast"] for witness in told(left, run)} == {"input" if run.endswith("fast") else None}
    assert distance(left, run, "one") < ROUNDING
    assert distance(one, "half", "one") > 100 * ROUNDING  # negative control


def test_ddp_keeps_the_processes_equal(two):
    first, second = told(two, "ddp")
    assert first == second
    assert not first["sharded"]


def test_fsdp_trains_shards(two):
    whole = told(two, "ddp")[0]["elements"]
    first, second = told(two, "fsdp_plan")
    assert first["sharded"]
    assert second["sharded"]
    assert first["elements"] + second["elements"] == whole
    assert first["sums"] != second["sums"]


def test_the_adapter_of_shards_is_stock(two):
    base = load_classifier(two / "base", labels=2, seed=3)
    adapter = two / "fsdp_plan" / "adapter"
    model = PeftModel.from_pretrained(base, str(adapter))
    plan = AdapterPlan.load(adapter / "plan.json")
    plan.check(model)
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == list(plan.names)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items() if "lora_A" in name} == {
        f"base_model.model.{name}.lora_A.weight": (4, layer.in_features) for name, layer in lora_layers(model).items()
    }


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_bit_for_bit(more):
    for whole, again in zip(told(more, "fsdp_again-whole"), told(more, "fsdp_again"), strict=True):
        assert (whole["first_step"], again["first_step"]) == (0, 2)
        assert whole["last_step"] == again["last_step"] == 4
        assert whole["sums"] == again["sums"]


# -- what cannot be done, and the way round it -----------------------------------------------------------------------


@pytest.mark.slow
def test_weights_on_the_first_process_alone_are_refused(more):
    for error in told(more, "partly"):
        assert "cpu_ram_efficient_loading" in error
        assert "`weightlora select` in one process first, then `weightlora train --plan plan.json`" in error
    for error in told(more, "partly_plan"):
        assert "classifier.modules_to_save.default.weight without weights" in error


@pytest.mark.slow
def test_measuring_before_the_shards_is_refused(more):
    assert all("leave eval_on_start out" in error for error in told(more, "measured"))
    assert not (more / "measured" / "plan.json").exists()


def test_the_command_select_is_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["select"]) == 2
    assert "weightlora select is one process, and this is one of 2" in capsys.readouterr().err
