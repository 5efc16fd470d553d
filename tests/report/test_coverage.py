"""What `show` says of the fast step from files alone is what the model itself says."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.cli import main
from weightlora.fast.enable import fast_coverage
from weightlora.model.sites import find_sites
from weightlora.plan.make import make_plan, read_adapter
from weightlora.report.coverage import VARIANTS, fast_gaps


def net():
    return nn.ModuleDict({"table": nn.Embedding(8, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})


CONFIGS = {
    "plain": {},
    "rsLoRA, dropout, patterns": {"use_rslora": True, "lora_dropout": 0.1, "rank_pattern": {"up": 2}},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "MiCA": {"init_lora_weights": "mica"},
    "aLoRA": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
}
#: How the model itself calls it: the variant's class, or the reason.
CALLED = {"DoRA": "Dora", "lora_bias": "lora_bias", "MiCA": "MiCA", "aLoRA": "ALora"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_say_what_the_model_says(name, tmp_path, capsys):
    config = LoraConfig(r=4, target_modules=["up", "down"], **{"init_lora_weights": False, **CONFIGS[name]})
    base = net()
    base.prepare_inputs_for_generation = None  # what PEFT asks a language model for
    model = get_peft_model(base, config)
    model.save_pretrained(str(tmp_path / "adapter"))
    plan = make_plan(find_sites(net(), LoraConfig(target_modules=["up", "down"])).sites, config, ["up"])
    plan.save(tmp_path / "plan.json")

    covered = fast_coverage(model)
    count, gaps = fast_gaps(tmp_path / "adapter", read_adapter(tmp_path / "adapter"))
    assert (count, gaps.keys()) == (2, covered.stock.keys())
    assert all(CALLED[name] in covered.stock[site] and reason == name for site, reason in gaps.items())
    kept = {k: v for k, v in gaps.items() if k == "up"}
    assert fast_gaps(tmp_path / "plan.json", plan) == fast_gaps(tmp_path, plan) == (1, kept)

    assert main(["show", str(tmp_path / "adapter")]) == 0
    says = f"0 of 2 adapters: all are {name}" if gaps else "all 2 adapters"
    assert f"fast step {says}" in " ".join(capsys.readouterr().out.split())


def test_layers_of_other_kinds_are_named(tmp_path):
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=["table", "up"]))
    model.save_pretrained(str(tmp_path))
    assert fast_gaps(tmp_path, read_adapter(tmp_path)) == (2, {"table": "an embedding"})
    assert fast_coverage(model).covered == ("up",)


def test_convolutions_are_named(tmp_path):
    body = nn.ModuleDict({"patch": nn.Conv2d(3, 4, 2), "up": nn.Linear(6, 8)})
    model = get_peft_model(body, LoraConfig(r=4, target_modules=["patch", "up"]))
    model.save_pretrained(str(tmp_path))
    assert fast_gaps(tmp_path, read_adapter(tmp_path)) == (2, {"patch": "a convolution"})
    assert fast_coverage(model).covered == ("up",)


def test_adapters_on_parameters_are_named(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(2, 6, 8))

    body = nn.ModuleDict({"experts": Experts(), "up": nn.Linear(6, 8)})
    config = LoraConfig(r=4, target_modules=["up"], target_parameters=["experts.weights"])
    model = get_peft_model(body, config)
    model.save_pretrained(str(tmp_path))
    assert fast_gaps(tmp_path, read_adapter(tmp_path)) == (2, {"experts": "target_parameters"})
    assert fast_coverage(model).covered == ("up",)


def test_the_table_has_every_variant_of_this_peft():
    declared = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert declared <= set(VARIANTS)
    (starts,) = (f.metadata["lora_variants"] for f in dataclasses.fields(LoraConfig) if "lora_variants" in f.metadata)
    assert starts == ["mica"]
