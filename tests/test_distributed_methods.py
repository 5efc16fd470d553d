"""Two real processes under DDP: methods that act while they train hold what one process holds on the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import ParallelismConfig
from acting_worker import BEDS, METHODS, ROWS, STEPS, sentences, trained
from safetensors.torch import load_file

from weightlora.errors import OptionError
from weightlora.trainer.attach import method_for

#: As in test_distributed.py: halves of a batch are summed in another order than the whole.
ROUNDING = 3e-4
#: Methods that weigh sites against each other, so that their ranks tell what was decided.
UNEQUAL = ("adalora", "increlora", "dynamic_lora", "alora")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with what two processes have left there."""
    folder = tmp_path_factory.mktemp("acting")
    worker = str(Path(__file__).parent / "acting_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def told(folder, part):
    """What each of the two processes said."""
    return [json.loads((folder / f"{part}-{process}.json").read_text()) for process in range(2)]


def held(folder, part):
    """The file of each process's adapter."""
    return [folder / f"{part}-{process}.safetensors" for process in range(2)]


def distance(adapter, other):
    """The largest difference, matrix by matrix in units of its largest number."""
    assert adapter.keys() == other.keys()
    assert {name: value.shape for name, value in adapter.items()} == {
        name: value.shape for name, value in other.items()
    }
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)
    return max(((adapter[name] - other[name]).abs().max() / other[name].abs().max()).item() for name in adapter)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bed", BEDS)
def test_two_processes_decide_and_train_as_one(two, bed, name, tmp_path):
    """Sentences that count alike; and tokens that count alike, in micro-batches of unequally many."""
    one, notes = trained(bed, name, tmp_path / "one")
    first, second = told(two, f"{bed}-{name}")
    assert first == second == notes
    assert len(first["ranks"]) == STEPS
    if name in UNEQUAL:
        assert len(set(first["ranks"][-1])) > 1
    a, b = held(two, f"{bed}-{name}")
    assert a.read_bytes() == b.read_bytes()
    assert distance(load_file(a), one) < ROUNDING


@pytest.mark.parametrize("name", METHODS)
def test_one_process_on_half_of_the_rows_trains_something_else(two, name, tmp_path):
    """Negative control: else the equality above would say nothing."""
    half, notes = trained("sentences", name, tmp_path / "half", ROWS // 2)
    whole = load_file(held(two, f"sentences-{name}")[0])
    same_ranks = notes["ranks"] == told(two, f"sentences-{name}")[0]["ranks"]
    assert not same_ranks or distance(half, whole) > 100 * ROUNDING


@pytest.mark.parametrize("name", METHODS)
def test_the_first_process_decides(two, name):
    """The second one would decide the opposite, as a device that rounds otherwise might."""
    undisturbed = held(two, f"sentences-{name}")[0].read_bytes()
    assert [path.read_bytes() for path in held(two, f"disturbed-{name}")] == [undisturbed, undisturbed]
    for error in told(two, f"unshared-{name}"):  # negative control: each decides for itself
        assert "what was trained differs between the 2 processes" in error


@pytest.mark.parametrize("name", ["increlora", "alora"])
def test_processes_that_look_at_their_own_rows_only_are_stopped(two, name):
    """Negative control: both read more than DDP's averaged gradients."""
    for error in told(two, f"own-{name}"):
        assert "what was trained differs between the 2 processes" in error


@pytest.mark.parametrize("name", ["adalora", "increlora"])
def test_a_resumed_run_goes_on_bit_for_bit(two, name):
    """Also where only the first process can read the method's state."""
    for whole, resumed in zip(held(two, f"whole-{name}"), held(two, f"resumed-{name}"), strict=True):
        assert whole.read_bytes() == resumed.read_bytes()
    whole, resumed = told(two, f"whole-{name}")[0], told(two, f"resumed-{name}")[0]
    assert resumed["ranks"] == whole["ranks"][4:]


def test_increlora_refuses_a_batch_that_runs_through_other_sites(two):
    """It would wait for a gradient that the other process never sends."""
    for error in told(two, "skipping"):
        assert "the set of sites that a batch runs through differs between the 2 processes" in error


def test_shards_are_refused(two):
    for error in told(two, "parted"):
        assert "adalora changes ranks or gradients of whole matrices" in error


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", ["is_fsdp_enabled", "is_deepspeed_enabled", "parallelism_config"])
def test_parted_matrices_are_refused(tmp_path, name, setting):
    trainer = sentences(tmp_path, ROWS)
    if setting == "parallelism_config":
        trainer.args.parallelism_config = ParallelismConfig()
    else:
        setattr(trainer, setting, True)
    with pytest.raises(OptionError, match=f"{name} changes ranks or gradients of whole matrices .*in several without"):
        method_for(trainer, name, **METHODS[name])
