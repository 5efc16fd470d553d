"""The picture's numbers; pixels are only looked at."""

from dataclasses import replace

import pytest

from weightlora.model.sites import Site
from weightlora.plan.heatmap import draw_heatmap, make_heatmap
from weightlora.plan.plan import AdapterPlan, PlannedSite


def plan_of(*rows):
    entries = (PlannedSite(Site(name, 4, 4), 8, 16, r=r, alpha=16, score=score) for name, r, score in rows)
    return AdapterPlan(tuple(sorted(entries, key=lambda entry: entry.site.name)))


def test_layers_stand_in_their_own_order_not_the_alphabet():
    plan = plan_of(*((f"model.layers.{i}.q_proj", 8, float(i)) for i in range(12)))
    grid = make_heatmap(plan)
    assert grid.rows == tuple(map(str, range(12)))
    assert [row[0].level for row in grid.cells] == [i / 11 for i in range(12)]


def test_two_stacks_and_a_site_outside_both():
    plan = plan_of(("decoder.layers.0.fc1", 0, 1.0), ("encoder.layers.0.fc1", 8, 2.0), ("pooler.dense", 8, 3.0))
    grid = make_heatmap(plan)
    assert grid.columns == ("fc1", "pooler.dense")
    by_row = dict(zip(grid.rows, grid.cells, strict=True))
    assert by_row["decoder.layers.0"][1] is None
    assert by_row["encoder.layers.0"][0].entry.r == 8
    assert by_row["–"][1].level == 1.0


def test_equal_scores_draw_without_a_scale(tmp_path):
    plan = plan_of(("a.0.q", 8, 0.0), ("a.1.q", 0, 0.0))
    assert {cell.level for row in make_heatmap(plan).cells for cell in row if cell} == {0.0}
    draw_heatmap(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_projections_stand_in_the_order_of_the_forward_pass():
    names = ("mlp.down_proj", "self_attn.k_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")
    grid = make_heatmap(plan_of(*((f"layers.0.{name}", 8, float(i)) for i, name in enumerate(names))))
    order = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert grid.columns == order
    assert [cell.level for cell in grid.cells[0]] == [1.0, 0.25, 0.75, 0.5, 0.0]


def test_the_same_plan_gives_the_same_bytes_and_no_version_or_time(tmp_path):
    """The folder of a run is compared byte by byte; matplotlib writes its version unless it is told not to."""
    plan = plan_of(("a.0.q", 8, 1.0), ("a.1.q", 0, 2.0))
    draw_heatmap(plan, tmp_path / "one.png")
    draw_heatmap(plan, tmp_path / "two.png")
    picture = (tmp_path / "one.png").read_bytes()
    assert picture == (tmp_path / "two.png").read_bytes()
    assert b"tEXt" not in picture
    draw_heatmap(plan_of(("a.0.q", 8, 1.0), ("a.1.q", 8, 2.0)), tmp_path / "two.png")
    assert picture != (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("name", ["$\\frac$", "q" * 5000, "a\nb\x1b[2J", "$"])
def test_any_name_can_be_drawn(name, tmp_path):
    """A picture that fails at the end of a training would lose the adapter."""
    plan = replace(plan_of((f"a.0.{name}", 8, 1.0), (f"a.1.{name}", 0, 2.0)), rule=name)
    draw_heatmap(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
