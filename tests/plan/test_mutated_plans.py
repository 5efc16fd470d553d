"""Damaged plans and adapter directories: refused in one line, or read as something that can be attached."""

import dataclasses
import json
import re
from collections import Counter

import pytest
import torch
from fuzz import assert_one_line, cases, generator, mutated, tell
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from torch import nn

from weightlora.cli import main
from weightlora.errors import PlanError, WeightLoraError
from weightlora.model.layers import adapter_layers
from weightlora.model.sites import find_sites
from weightlora.plan._schema import _LORA
from weightlora.plan.attach import _PEFT_FIELDS, _PLANNED_FIELDS
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.validation import first_fault

#: Files of each kind; each takes some 5 ms.
COUNT = cases(500, 10_000)
SHOWN = 10
"""One in so many is also given to ``weightlora show``."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))


def plan_of(**lora):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1", "2"], **lora)
    scored = {"scores": [3.0, 1.0, 2.0], "errors": [0.1, 0.2, 0.3], "history": ((1.0, 2.0, 3.0), (3.0, 1.0, 2.0))}
    options = {"adapters": 2, "steps": 2, "kind": "mlp", "warm_start": False, "agreement": 0.5}
    options |= {"learning_rate": 1e-3, "step_time": 0.5, "step_share": 0.6, "epochs": 3.0, "run_time": 0.5}
    options |= {"time": 0.6, "floor_times": [0.9, 0.5], "peak_bytes": 10, "lora_peak_bytes": 20}
    return make_plan(find_sites(net(), lora).sites, lora, ["0", "2"], rule="first_order", options=options, **scored)


#: Each field of a LoraConfig that a plan may hold is in one of them.
LORAS = [
    {},
    {"lora_dropout": 0.1, "bias": "lora_only", "use_rslora": True, "task_type": "FEATURE_EXTRACTION"},
    {"use_dora": True, "exclude_modules": ["nothing"], "init_lora_weights": "gaussian", "fan_in_fan_out": True},
    {"lora_bias": True, "exclude_modules": "nothing.*", "trainable_token_indices": [1], "ensure_weight_tying": True},
]


def assert_sane(plan):
    """Written without the reader's own checks."""
    text = json.dumps(dataclasses.asdict(plan), ensure_ascii=False)
    text.encode()
    assert type(plan.seed) is int
    assert max(map(len, str(plan).splitlines())) <= 80
    for entry in plan.entries:
        sizes = (entry.site.in_features, entry.site.out_features, entry.lora_r, entry.r + 1)
        assert all(type(size) is int and 1 <= size < 2**31 for size in sizes)
        assert max(entry.r, entry.lora_r) <= 2**20
        numbers = (entry.alpha, entry.lora_alpha, entry.score, entry.score_error or 0.0)
        assert all(type(number) in (int, float) and abs(number) <= 1e300 for number in numbers)
        assert min(entry.alpha, entry.lora_alpha) > 0
    for row in plan.history:
        assert len(row) == len(plan.entries)
        assert all(type(number) in (int, float) and abs(number) <= 1e300 for number in row)
    assert plan.names
    assert isinstance(plan.rule, str)
    assert isinstance(plan.base_model, str | None)
    assert all(isinstance(value, str) for value in plan.versions.values())


def use(plan, folder):
    """What follows reading: the plan is written, read again and attached; or it is refused in one line."""
    assert_sane(plan)
    plan.save(folder / "again.json")
    assert AdapterPlan.load(folder / "again.json") == plan or plan.options != plan.options  # NaN is not itself
    if max(entry.r for entry in plan.entries) > 64:
        return "too large to attach"
    try:
        model = plan.attach(net())
    except WeightLoraError as error:
        assert_one_line(error)
        return "read, not attached"
    assert {name: layer.r["default"] for name, layer in adapter_layers(model).items()} == {
        name: plan.ranks[name] for name in plan.names
    }
    model.get_base_model().train()(torch.ones(2, 4)).sum().backward()
    return "attached"


def show(path, capsys):
    """``weightlora show`` prints it, or says in one line why not."""
    status = main(["show", str(path)])
    output = capsys.readouterr()
    assert status in (0, 2), output
    assert status == 0 or output.err.count("\n") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", output.out.replace("\x1b[", "") + output.err)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_mutated_plans(tmp_path, capsys):
    rng, counts, path = generator(), Counter(), tmp_path / "plan.json"
    plans = []
    for lora in LORAS:
        plan_of(**lora).save(path)
        plans.append(path.read_text())
    fields = [*_LORA, *_PLANNED_FIELDS, "kind", "score_error", "frob"]
    for i in range(COUNT):
        text = mutated(rng, json.loads(rng.choice(plans)), fields)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            counts[use(AdapterPlan.load(path), tmp_path)] += 1
        except PlanError as error:
            assert_one_line(error)
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {i}: {text[:3000]}") from error
        if i % SHOWN == 0:
            show(path, capsys)
    tell(capsys, f"{COUNT} mutated plans: {dict(counts)}; 0 raw tracebacks, 0 accepted nonsense")
    assert counts["refused"] > COUNT / 3  # the generator does damage
    assert counts["attached"] > COUNT / 50  # and what it leaves whole is accepted
    assert sum(counts.values()) == COUNT


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_mutated_adapter_directories(tmp_path, capsys):
    rng, counts, folder = generator(1), Counter(), tmp_path / "adapter"
    from weightlora.plan.plan import read_adapter

    get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"])).save_pretrained(folder)
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole, weights = config.read_text(), tensors.read_bytes()
    key = "base_model.model.0.lora_{}.weight"
    shapes = [{"A": (2, 4), "B": (6, 2)}, {"A": (2, 4)}, {"B": (6, 2)}, {"A": (2, 4), "B": (6, 3)}, {"A": (0, 4)}, {}]
    for i in range(COUNT):
        config.write_bytes(mutated(rng, json.loads(whole), list(_LORA)).encode("utf-8", "surrogatepass"))
        kind = rng.choice(("whole", "whole", "cut", "flipped", "shapes"))
        cut = rng.randrange(len(weights))
        flipped = weights[:cut] + bytes([rng.randrange(256)]) + weights[cut + 1 :]
        tensors.write_bytes({"cut": weights[:cut], "flipped": flipped}.get(kind, weights))
        if kind == "shapes":
            save_file({key.format(m): torch.zeros(shape) for m, shape in rng.choice(shapes).items()}, tensors)
        try:
            plan = read_adapter(folder)
            assert_sane(plan)
            plan.save(tmp_path / "again.json")
            assert AdapterPlan.load(tmp_path / "again.json") == plan
            counts["read"] += 1
        except PlanError as error:
            assert_one_line(error)
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"mutation {i}: {kind} {config.read_bytes()[:2000]}") from error
        if i % SHOWN == 0:
            show(folder, capsys)
    tell(capsys, f"{COUNT} mutated adapters: {dict(counts)}; 0 raw tracebacks, 0 accepted nonsense")
    assert min(counts["read"], counts["refused"]) > COUNT / 5
    assert sum(counts.values()) == COUNT


def test_the_table_has_every_field_of_a_lora_config():
    """A new version of PEFT adds fields; this says which to add."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert _LORA.keys() == fields - {*_PLANNED_FIELDS, *_PEFT_FIELDS}


@pytest.mark.parametrize("task", [task.value for task in TaskType])
def test_the_table_has_every_task(task):
    assert first_fault(_LORA["task_type"][1], task) is None


@pytest.mark.parametrize("options", LORAS)
@pytest.mark.filterwarnings("ignore:exclude_modules has names")
def test_what_a_plan_holds_is_read_back(options, tmp_path):
    plan = plan_of(**options)
    plan.save(tmp_path / "plan.json")
    assert AdapterPlan.load(tmp_path / "plan.json") == plan
