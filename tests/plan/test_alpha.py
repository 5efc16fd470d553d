"""Alpha of a lower rank: it carries the learning rate over, it is whole, and equal alphas stay equal."""

import math

import pytest
from peft import LoraConfig

from weightlora.model.sites import Site
from weightlora.plan.limits import Limits
from weightlora.plan.make import make_plan
from weightlora.selection.allocate import Costs, allocate

SITES = [Site(f"layer.{i}.{kind}", 16, 16) for i in range(4) for kind in "kqv"]
NAMES = [site.name for site in SITES]


def plan_of(lora, ranks, alpha_by="root"):
    return make_plan(SITES, lora, NAMES, ranks=dict(zip(NAMES, ranks, strict=True)), alpha_by=alpha_by)


@pytest.mark.parametrize("r", [1, 2, 4, 7, 8, 16])
def test_alpha_grows_with_the_root_of_the_rank(r):
    plan = plan_of(LoraConfig(r=8, lora_alpha=16), [r] * 12)
    assert {entry.alpha for entry in plan.entries} == {round(16 * math.sqrt(r / 8))}
    assert plan.to_lora_config().alpha_pattern == {}


def test_single_sites_of_one_rank_more_have_the_same_alpha():
    """llama.cpp reads one alpha for all tensors."""
    lora = LoraConfig(r=8, lora_alpha=16)
    ranks = allocate(SITES, None, Costs.of(SITES, lora), Limits(parameters=0.3))
    assert sorted({*ranks}) == [2, 3]
    assert plan_of(lora, ranks).to_lora_config().alpha_pattern == {}
    assert plan_of(lora, ranks).to_lora_config().lora_alpha == round(16 * math.sqrt(2 / 8))


def test_the_ratio_stays_where_it_is_asked_for_and_rslora_keeps_alpha():
    ratio = plan_of(LoraConfig(r=8, lora_alpha=16), [2] * 12, alpha_by="ratio")
    assert {entry.alpha for entry in ratio.entries} == {4}
    rslora = plan_of(LoraConfig(r=8, lora_alpha=16, use_rslora=True), [2] * 12)
    assert {entry.alpha for entry in rslora.entries} == {16}


def test_a_small_or_broken_alpha_stays_positive():
    assert {entry.alpha for entry in plan_of(LoraConfig(r=64, lora_alpha=1), [1] * 12).entries} == {1}
    half = plan_of(LoraConfig(r=4, lora_alpha=2.5), [1] * 12)  # PEFT takes floats as well
    assert {entry.alpha for entry in half.entries} == {1.25}


def test_alpha_patterns_of_the_user_scale_alike():
    lora = LoraConfig(r=8, lora_alpha=16, alpha_pattern={"k": 32}, rank_pattern={"k": 16})
    ranks = [4 if name.endswith("k") else 2 for name in NAMES]  # a quarter of each
    assert {entry.site.projection: entry.alpha for entry in plan_of(lora, ranks).entries} == {"k": 16, "q": 8, "v": 8}
