"""print(plan) is one screen, and its numbers are the plan's."""

import re

import pytest

from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite

BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT += ["intermediate.dense", "output.dense"]
LLAMA = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
MANY = [f"experts.a_projection_with_a_long_name_{i}" for i in range(20)]


def planned(stack, blocks, projections, *more, every=3):
    """Every third site is kept."""
    names = sorted([*(f"{stack}.{i}.{name}" for i in range(blocks) for name in projections), *more])
    sites = (
        PlannedSite(Site(name, 8, 8), 4, 8, r=4 * (i % every == 0), alpha=8, score=i) for i, name in enumerate(names)
    )
    return AdapterPlan(tuple(sites), rule="first_order", base_model="/a/long/folder" * 20)


@pytest.mark.parametrize(
    ("plan", "sites"),
    [
        (planned("bert.encoder.layer", 6, BERT), 36),
        (planned("bert.encoder.layer", 6, BERT, "bert.pooler.dense"), 37),
        (planned("model.layers", 30, LLAMA), 210),
        (planned("model.layers", 80, LLAMA), 560),
        (planned("model.layers", 50, MANY), 1000),
        (
            AdapterPlan(
                tuple(PlannedSite(Site(f"n{i}\x1b" * 9, 8, 8), 4, 8, r=0, alpha=8, score=0) for i in range(99))
            ),
            99,
        ),
    ],
    ids=["minilm", "with-pooler", "smollm2", "80-blocks", "1000-sites", "odd-names"],
)
def test_a_printed_plan_is_one_screen(plan, sites):
    text = str(plan)
    lines = text.splitlines()
    assert len(plan.entries) == sites
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    assert text.replace("\n", "").isprintable()
    assert f"{len(plan.names)} of {sites} adapters, {plan.parameters:,} of LoRA's {plan.lora_parameters:,}" in text
    assert len(repr(plan)) <= 160
    assert "\n" not in repr(plan)
    # The table's cells add up to what is kept: ranks of single sites, or counts of groups.
    start = lines.index("") + 1
    cells = [cell for line in lines[start : lines.index("", start)] for cell in line.split()[1:]]
    kept = sum(int(cell.partition("/")[0]) if "/" in cell else 1 for cell in cells if re.fullmatch(r"\d+(/\d+)?", cell))
    assert kept == len(plan.names)


def test_a_printed_plan_names_the_lowest_block_and_the_ranks():
    plan = planned("model.layers", 12, LLAMA, every=50)
    assert plan.names == ("model.layers.0.mlp.down_proj", "model.layers.5.mlp.gate_proj")
    lines = str(plan).splitlines()
    assert "          floor: model.layers.0, the lowest block with an adapter" in lines
    row = next(line for line in lines if line.split()[:1] == ["5"])
    assert row.split() == ["5", *("·" * 4), "4", "·", "·"]
