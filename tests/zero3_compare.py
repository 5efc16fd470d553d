"""Raise unless ZeRO-3 in two processes left what one process did: zero3_compare.py FOLDER (see .ci/zero3)."""

import sys
from pathlib import Path

from safetensors.torch import load_file

from weightlora.plan.plan import AdapterPlan

#: Two processes add halves of a batch in another order: some 1e-7 of a sum's terms, which partly cancel.
ROUNDING = 1e-5

runs = Path(sys.argv[1]) / "runs"
plan, weights = AdapterPlan.load(runs / "one/plan.json"), load_file(runs / "one/adapter/adapter_model.safetensors")
largest = max(plan.scores.values())
for name in ("two", "steps"):
    other, adapter = (
        AdapterPlan.load(runs / name / "plan.json"),
        load_file(runs / name / "adapter/adapter_model.safetensors"),
    )
    score = max(abs(other.scores[site] - plan.scores[site]) for site in plan.scores) / largest
    weight = max(((adapter[key] - value).abs().max() / value.abs().max()).item() for key, value in weights.items())
    trained = sum(bool(value.any()) for key, value in adapter.items() if "lora_B" in key)
    same = (other.names, other.ranks, adapter.keys()) == (plan.names, plan.ranks, weights.keys())
    sys.stdout.write(f"{name}: same sites {same}, scores within {score:.1e}, adapter within {weight:.1e}\n")
    if not same or score > ROUNDING or weight > ROUNDING or trained != len(plan.names):
        raise SystemExit(f"runs/{name} is not what one process left in runs/one")
