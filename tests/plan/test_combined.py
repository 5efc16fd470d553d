"""PEFT combines adapters of plans in memory: ``add_weighted_adapter`` after ``attach`` and ``to_lora_config``."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.make import make_plan

RANKS = {"a": 2, "b": 4, "c": 0, "d.a": 0}


class Net(nn.Module):
    """Four sites; a kept ``a`` is the ending of ``d.a``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in "abcd")
        self.d = nn.ModuleDict({"a": nn.Linear(6, 6)})

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x) + self.d["a"](x)


def plan_of(ranks):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b", "c"], init_lora_weights=False)
    kept = [name for name, r in ranks.items() if r]
    return make_plan(find_sites(Net(), lora).sites, lora, kept, ranks=ranks)


def updates(model, adapter):
    return {n: layer.get_delta_weight(adapter) for n, layer in lora_layers(model, adapter).items()}


@pytest.mark.parametrize("attached_by", ["attach", "get_peft_model"])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_combined_adapter_is_the_weighted_sum(attached_by, kind, tmp_path):
    torch.manual_seed(0)
    first, second = plan_of(RANKS), plan_of({**RANKS, "b": 0, "c": 4})
    model = first.attach(Net()) if attached_by == "attach" else get_peft_model(Net(), first.to_lora_config())
    model.add_adapter("second", second.to_lora_config())
    one, two = (updates(model, name) for name in ("default", "second"))
    model.add_weighted_adapter(
        ["default", "second"],
        [0.5, 2.0],
        "both",
        combination_type=kind,
        svd_rank=6,  # the layer's, so that nothing is cut
    )
    both = updates(model, "both")
    assert both.keys() == one.keys() | two.keys()
    for name, delta in both.items():
        zero = torch.zeros(6, 6)
        total = 0.5 * one.get(name, zero) + 2 * two.get(name, zero)
        torch.testing.assert_close(delta, total, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    for folder, sites in ((".", one), ("both", both)):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(sites)
        assert config["peft_type"] == "LORA"
