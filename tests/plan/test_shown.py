"""A plan as it is shown: printed, on the screen with its trivial alternatives, as a picture, on the model card."""

import re
import sys
from dataclasses import replace
from math import ceil

import pytest
from fuzz import assert_plain, plan_with, texts
from huggingface_hub import ModelCard
from torch import nn

from weightlora.model.sites import Site
from weightlora.plan._screen import alternatives, floor_share, floor_times
from weightlora.plan.card import write_card
from weightlora.plan.heatmap import draw_heatmap, make_heatmap
from weightlora.plan.plan import AdapterPlan, PlannedSite

# -- the screen, and the trivial alternatives on it: numbers derived from ranks and shapes ---------------------------

R, WIDTH, BLOCKS = 8, 16, 6


def plan_of(ranks, *, options=None, spent=None, names=None, **fields):
    """A plan of one square layer a block, at these ranks."""
    sites = [
        PlannedSite(Site(name, WIDTH, WIDTH), R, 16, r=r, alpha=16, score=float(i))
        for i, (name, r) in enumerate(zip(names or [f"layer.{i}.q" for i in range(len(ranks))], ranks, strict=True))
    ]
    return AdapterPlan(tuple(sites), options=options or {}, spent=spent or {}, **fields)


def rows_of(plan):
    return {row.name: row for row in alternatives(plan)}


def test_a_step_that_only_counts_memory_is_not_called_scoring():
    spent = {"scoring_steps": 1, "total_steps": 300}
    counted, scored = (str(plan_of([R] * BLOCKS, rule=rule, spent=spent)) for rule in ("uniform", "first_order"))
    assert "\ncounting  1 step (0.3 % of 300)" in counted
    assert "scoring" not in counted
    assert "\nscoring   1 step (0.3 % of 300)" in scored


def test_the_lower_rank_is_the_highest_that_has_no_more_parameters():
    """Two of six sites at rank 8 have 16 ranks: rank 2 on all six has 12, rank 3 would have 18."""
    rows = rows_of(plan_of([0, 0, 0, 0, R, R]))
    assert rows["LoRA, rank 2"].parameters == 6 * 2 * 2 * WIDTH <= rows["this plan"].parameters == 2 * R * 2 * WIDTH
    assert rows["LoRA, rank 8"].parameters == 6 * R * 2 * WIDTH
    assert [name for name in rows if name.startswith("LoRA, rank")] == ["LoRA, rank 8", "LoRA, rank 2"]


def test_a_plan_of_less_than_rank_one_on_all_has_no_lower_rank():
    assert not [name for name in rows_of(plan_of([1, 0, 0, 0, 0, 0])) if name in ("LoRA, rank 1", "LoRA, rank 0")]


@pytest.mark.parametrize("floor", range(BLOCKS))
def test_time_is_estimated_from_the_floor(floor):
    """Forward 1 and backward 1 - f, of the 2 that LoRA takes."""
    plan = plan_of([0] * floor + [R] * (BLOCKS - floor))
    assert floor_share(plan) == floor / BLOCKS
    row = alternatives(plan)[0]
    assert row.step_time == pytest.approx((2 - floor / BLOCKS) / 2)
    assert row.time_known == "estimated"
    assert row.memory == pytest.approx(1 - floor / BLOCKS)


def test_a_pooler_does_not_lower_the_floor():
    plan = plan_of([0, R, R], names=["layer.0.q", "layer.1.q", "pooler"])
    assert floor_share(plan) == 0.5


def test_measured_figures_take_the_place_of_estimates_and_say_so():
    options = {"time": 0.6, "step_time": 0.58, "peak_bytes": 4 * 10**8, "lora_peak_bytes": 10**9}
    options |= {"lora_rows": 8, "lora_rows_peak_bytes": 3 * 10**8}
    plan = plan_of([0, 0, R, R, R, R], options=options, spent={"scoring_steps": 9, "total_steps": 300})
    own, lora, *_ = alternatives(plan)
    assert (own.step_time, own.time_known, own.memory, own.memory_known) == (0.58, "measured", 4e8, "counted")
    assert own.training_time == pytest.approx(0.58 + 9 / 300)
    assert lora.memory == 1e9
    assert "LoRA, 61 % of the steps" in rows_of(plan)  # 0.58 + 0.03
    assert rows_of(plan)["LoRA, 8 rows at once"].memory == 3e8
    assert "LoRA, 8 rows at once" not in rows_of(replace(plan, options={"peak_bytes": 4, "lora_peak_bytes": 10}))
    assert "pays back in time from step 22 on" in str(plan)  # 9 / 0.42 = 21.4


def test_rows_at_once_are_said_even_where_a_plan_lacks_their_number():
    assert "fewer rows at once, 4 times a batch" in str(plan_of([R, R], options={"memory": "1GB", "batch_parts": 4}))
    assert "1 row at once, 4 times" in str(plan_of([R, R], options={"batch_parts": 4, "lora_rows": 1}))


@pytest.mark.parametrize("epochs", [1.0, 3.0, 2.5])
def test_a_plan_for_a_store_has_the_time_of_its_run_and_of_other_floors(epochs):
    """2(1 - f)E + f of LoRA's 2E; with one epoch what a step takes, as nothing is read back."""
    plan = plan_of([0, 0, 0, R, R, R], options={"adapters": 3, "epochs": epochs}, spent={"scoring_steps": 3})
    expected = [(2 * (1 - i / 6) * epochs + i / 6) / (2 * epochs) for i in range(1, 6)]
    assert floor_times(plan) == pytest.approx(expected)
    own = alternatives(plan)[0]
    assert (own.step_time, own.training_time) == pytest.approx((0.75, expected[2]))
    assert f"LoRA, {100 * expected[2]:.0f} % of the steps" in rows_of(plan)
    assert f"floors    {epochs:g} epochs with a store: 1/6 {expected[0]:.2f} 1/3 " in str(plan)
    assert f"pays back in time from step {ceil(3 / (1 - expected[2]))} on" in str(plan)
    assert max(map(len, str(plan).splitlines())) <= 80
    measured = replace(plan, options={**plan.options, "run_time": 0.41, "floor_times": [0.9, 0.8, 0.7, 0.6, 0.5]})
    assert alternatives(measured)[0].training_time == 0.41
    assert "1/6 0.90 1/3 0.80 1/2 0.70 2/3 0.60 5/6 0.50\n" in str(measured)
    assert floor_times(plan_of([0, R])) == []
    assert "floors " not in str(plan_of([0, R]))


def test_nothing_to_select_is_said():
    assert "nothing to select: all 6 adapters" in str(plan_of([R] * 6))
    assert "nothing to select" in str(plan_of([2] * 6, rule="uniform", options={"parameters": 0.25}))
    assert "nothing to select" not in str(plan_of([0] * 3 + [R] * 3))
    assert "rank 2 on all sites, so that there is nothing to select" in str(plan_of([2] * 6, rule="uniform"))
    assert "rank 1 to 2 on all sites\n" in str(plan_of([1, 2, 1, 2], rule="integrated_ranks"))


def test_ranks_are_a_table_where_they_differ():
    assert "rank of each adapter" in str(plan_of([1, 2]))
    assert "rank of each adapter" in str(plan_of([0, 2]))
    assert "rank of each adapter" not in str(plan_of([2, 2]))


def test_the_screen_fits_80_columns_and_40_lines_whatever_the_names_are():
    kinds = [f"self_attn.{'very_long_projection_name_' * 2}{i}" for i in range(9)]
    names = [f"{'prefix.' * 12}layers.{block}.{kind}" for block in range(60) for kind in kinds]
    options = {"parameters": 123_456_789, "adapters": 99, "time": 0.6, "memory": "123.5GiB", "learning_rate": 1e-3}
    text = str(plan_of([R] * len(names), names=names, options=options, base_model="x/" * 90))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 40


def test_a_notebook_shows_the_heat_map_and_the_screen_with_names_escaped():
    page = plan_of([R, 0], names=["layer.0.<b>", "layer.1.<b>"], base_model="<script>")._repr_html_()
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;b&gt;" in page
    assert page.count("<tr>") == 3
    assert "LoRA, rank 8" in page


def test_what_was_spent_is_in_the_file_and_is_no_part_of_the_plans_equality(tmp_path):
    plan = plan_of([R, 0], spent={"scoring_steps": 9})
    plan.save(tmp_path / "plan.json")
    assert AdapterPlan.load(tmp_path / "plan.json").spent == {"scoring_steps": 9}
    assert replace(plan, spent={}) == plan


@pytest.mark.parametrize(("kept", "factor"), [(1, 2.0), (2, 2.0), (3, 1.0), (10, 1.0), (20, 1.0)])
def test_few_adapters_at_loras_alpha_want_twice_the_rate(kept, factor):
    """Below 0.15 of the parameters: 1 and 2 of 20 equal sites are 0.05 and 0.1, 3 are 0.15."""
    plan = plan_of([0] * (20 - kept) + [R] * kept)
    assert plan.learning_rate_factor == factor
    assert ("about 2 times LoRA's" in str(plan)) == (factor == 2)


@pytest.mark.parametrize(("r", "factor"), [(1, 2.0), (2, 2.0), (3, 1.3), (4, 1.0), (7, 1.0), (8, 1.0), (16, 1.0)])
def test_lower_ranks_want_up_to_twice_the_rate(r, factor):
    """1 at half of LoRA's parameters, 2 at a quarter, inverse to them in between: 8 / (2 · 3) is 1.3 at rank 3."""
    assert plan_of([r] * 20).learning_rate_factor == factor
    assert plan_of([r] * 20, lora={"use_rslora": True}).learning_rate_factor == 1.0


def test_layers_within_a_limit_on_time_have_a_note_of_what_takes_as_long():
    options = {"time": 0.6, "step_time": 0.58}
    note = "note      LoRA with 58 % of the steps takes as long: better on one task of two\n"
    assert note in str(plan_of([0, 0, 0, 0, 0, R], options=options)) + "\n"
    for changed in ({"time": None}, {"epochs": 3.0}):  # none is asked for, or there is a store
        assert "takes as long" not in str(plan_of([0, 0, 0, 0, 0, R], options={**options, **changed}))
    for changed in ({}, {"step_share": 0.6}):  # no layer is left out
        assert "takes as long" not in str(plan_of([R] * 6, options={**options, **changed}))


def test_a_plan_for_fewer_steps_has_their_time():
    plan = plan_of([2] * 6, rule="uniform", options={"time": 0.6, "parameters": 0.25, "step_share": 0.6})
    assert "train     60 % of the steps; to keep fewer layers instead, name a rule" in str(plan)
    assert [(row.name, row.step_time, row.training_time) for row in alternatives(plan)] == [
        ("this plan", 1.0, 0.6),
        ("LoRA, rank 8", 1.0, 1.0),
        ("LoRA, rank 2", 1.0, 1.0),
    ]
    assert plan_of([R]).step_share == 1.0


# -- print(plan) is one screen, and its numbers are the plan's -------------------------------------------------------

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
                tuple(PlannedSite(Site(f"n{i}\x1b" * 9, 8, 8), 4, 8, r=i % 2, alpha=8, score=0) for i in range(99))
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


# -- the picture's numbers; pixels are only looked at ----------------------------------------------------------------


def scored_plan(*rows):
    entries = (PlannedSite(Site(name, 4, 4), 8, 16, r=r, alpha=16, score=score) for name, r, score in rows)
    return AdapterPlan(tuple(sorted(entries, key=lambda entry: entry.site.name)))


def test_layers_stand_in_their_own_order_not_the_alphabet():
    plan = scored_plan(*((f"model.layers.{i}.q_proj", 8, float(i)) for i in range(12)))
    grid = make_heatmap(plan)
    assert grid.rows == tuple(map(str, range(12)))
    assert [row[0].level for row in grid.cells] == [i / 11 for i in range(12)]


def test_two_stacks_and_a_site_outside_both():
    plan = scored_plan(("decoder.layers.0.fc1", 0, 1.0), ("encoder.layers.0.fc1", 8, 2.0), ("pooler.dense", 8, 3.0))
    grid = make_heatmap(plan)
    assert grid.columns == ("fc1", "pooler.dense")
    by_row = dict(zip(grid.rows, grid.cells, strict=True))
    assert by_row["decoder.layers.0"][1] is None
    assert by_row["encoder.layers.0"][0].entry.r == 8
    assert by_row["–"][1].level == 1.0


def test_equal_scores_draw_without_a_scale(tmp_path):
    plan = scored_plan(("a.0.q", 8, 0.0), ("a.1.q", 0, 0.0))
    assert {cell.level for row in make_heatmap(plan).cells for cell in row if cell} == {0.0}
    draw_heatmap(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_projections_stand_in_the_order_of_the_forward_pass():
    names = ("mlp.down_proj", "self_attn.k_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")
    grid = make_heatmap(scored_plan(*((f"layers.0.{name}", 8, float(i)) for i, name in enumerate(names))))
    order = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert grid.columns == order
    assert [cell.level for cell in grid.cells[0]] == [1.0, 0.25, 0.75, 0.5, 0.0]


def test_the_same_plan_gives_the_same_bytes_and_no_version_or_time(tmp_path):
    """The folder of a run is compared byte by byte; matplotlib writes its version unless it is told not to."""
    plan = scored_plan(("a.0.q", 8, 1.0), ("a.1.q", 0, 2.0))
    draw_heatmap(plan, tmp_path / "one.png")
    draw_heatmap(plan, tmp_path / "two.png")
    picture = (tmp_path / "one.png").read_bytes()
    assert picture == (tmp_path / "two.png").read_bytes()
    assert b"tEXt" not in picture
    draw_heatmap(scored_plan(("a.0.q", 8, 1.0), ("a.1.q", 8, 2.0)), tmp_path / "two.png")
    assert picture != (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("name", ["$\\frac$", "q" * 5000, "a\nb\x1b[2J", "$"])
def test_any_name_can_be_drawn(name, tmp_path):
    """A picture that fails at the end of a training would lose the adapter."""
    plan = replace(scored_plan((f"a.0.{name}", 8, 1.0), (f"a.1.{name}", 0, 2.0)), rule=name)
    draw_heatmap(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000


# -- the model card shows names as they are written, and the plan as a picture ---------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("text", texts(3, 20), ids=lambda _: "text")
def test_the_card_has_one_row_for_each_projection(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n\n# Model\n", encoding="utf-8")
    plan = plan_with(text, name="layer.0." + text)
    write_card(tmp_path, plan, nn.Identity())
    body = ModelCard.load(path).text.partition("## Selection")[2]
    assert_plain(body)
    *_, row = body.rstrip("\n").splitlines()
    assert len([i for i, c in enumerate(row) if c == "|" and (len(row[:i]) - len(row[:i].rstrip("\\"))) % 2 == 0]) == 5
    assert "<b>" not in row.replace("\\<b\\>", "")
    assert body.count("\n| ") == 3  # header, line, one row


def card_of(folder, plan):
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Model\n", encoding="utf-8")
    write_card(folder, plan, nn.Identity())
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_shows_a_picture_whose_text_is_the_plans_summary(tmp_path):
    text = card_of(tmp_path / "adapter", plan_with("plain"))
    (alt, target), *more = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    assert more == []
    assert (tmp_path / "adapter" / target).read_bytes().startswith(b"\x89PNG")
    assert "1 of 1 sites, 16 adapter parameters (LoRA on all: 16)" in alt  # r·(in + out) = 2·(4 + 4)
    assert alt.isprintable()


def test_without_matplotlib_the_card_is_the_same_without_the_picture(tmp_path, monkeypatch):
    plan = plan_with("plain")
    whole = card_of(tmp_path / "whole", plan)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python says that there is no such package
    bare = card_of(tmp_path / "bare", plan)
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["README.md"]
    assert bare == re.sub(r"!\[.*\n\n", "", whole)
    assert "plan.png" not in bare
