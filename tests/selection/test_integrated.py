"""The rule ``integrated``: its sum is the loss that was saved, its parts are those of a slow path integral."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from test_scoring import LORA, Net, batches, squared

from weightlora import select
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.budget import Budget
from weightlora.selection.rules.integrated import Integrated, gauss_legendre
from weightlora.selection.stage import probed, train_adapters


class Quick(Integrated):
    """Scores that are read from two batches."""

    probes = 2


def noded(count):
    """The rule with so many points of the quadrature."""
    return type("Noded", (Integrated,), {"nodes": count})()


def selected(rule, *, steps=6, data=None, model=None, loss_fn=squared, seed=0, **limits):
    data = batches(rule.batches((steps,))) if data is None else data
    options = {"lora": LORA, "steps": steps, "learning_rate": 0.05, "seed": seed, "progress": False}
    options |= limits or {"adapters": 2}
    return select(model or Net(), data, rule=rule, loss_fn=loss_fn, **options)


def trained_losses(data, steps, omegas):
    """The losses of the last batches after ``steps`` of LoRA, with all gates at each of ``omegas``."""
    net, losses = Net(), []
    sites = find_sites(net, LORA).sites
    with probed(net, LORA, sites, batches=data, steps=len(data), seed=0, loss_fn=squared) as stage:
        train_adapters(stage, steps=steps, learning_rate=0.05, scale=0.5**0.5)  # two of four sites stay
        with gated(stage.layers) as gates, torch.no_grad():
            for omega in omegas:
                gates.write(omega)
                losses.append([squared(net, batch).item() for batch in data[steps:]])
    return torch.tensor(losses).mean(1).tolist()


def test_the_scores_sum_to_the_loss_that_was_saved():
    data = batches(10)
    before, after = trained_losses(data, 6, [torch.zeros(4), torch.ones(4)])
    plan = selected(Integrated(), data=data)
    assert before - after > 0.01  # something was learnt
    assert sum(plan.scores.values()) == pytest.approx(before - after, rel=0.01)
    # Negative control: the slope at the end alone misses the curvature.
    with_one_node = sum(selected(noded(1), data=data).scores.values())
    assert abs(with_one_node - (before - after)) > abs(sum(plan.scores.values()) - (before - after))


def test_each_score_is_the_path_integral_of_its_own_gate():
    data, h = batches(10), 1e-3
    plan = selected(noded(5), data=data)
    for site, score in enumerate(plan.scores.values()):
        slopes = []
        for node, weight in gauss_legendre(5):
            up, down = (torch.full((4,), node).index_add(0, torch.tensor([site]), torch.tensor([d])) for d in (h, -h))
            high, low = trained_losses(data, 6, [up, down])
            slopes.append(weight * (high - low) / (2 * h))
        # ω is fp32, so that ω ± h is off by 6e-8: of a slope of 1e-2 that is 6e-7 ÷ 2e-3.
        assert score == pytest.approx(-sum(slopes), rel=5e-3, abs=2e-5)


def test_the_error_is_that_of_a_mean_over_the_probes():
    data = batches(10)
    plan = selected(Integrated(), data=data)
    alone = [selected(Quick(), data=[*data[:6], data[6 + i], data[6 + i]]).scores for i in range(4)]
    each = torch.tensor([list(scores.values()) for scores in alone], dtype=torch.float64)
    errors = torch.tensor([entry.score_error for entry in plan.entries], dtype=torch.float64)
    torch.testing.assert_close(errors, each.std(0) / 4**0.5, rtol=1e-4, atol=1e-9)


class Branches(Net):
    """Four layers side by side, each with inputs of its own; those of the second one are zero."""

    def forward(self, x):
        parts = [layer(part).tanh() for layer, part in zip(self.layers, x.split(6, dim=1), strict=True)]
        return parts[0] + 0 * parts[1] + parts[2] + parts[3]


def test_a_dead_site_scores_nothing_and_a_planted_one_most():
    teacher = Branches()
    with torch.no_grad():
        torch.manual_seed(5)
        teacher.layers[2].weight += 0.3 * torch.randn(6, 6).double()
        inputs = [torch.randn(16, 24).double() for _ in range(24)]
        data = [{"x": x, "y": teacher(x)} for x in inputs]
    with pytest.warns(WeightLoraWarning, match=r"1 of 4 sites had no gradient in the scoring, layers\.1"):
        plan = selected(Integrated(), steps=20, data=data, adapters=1, model=Branches())
    assert plan.names == ("layers.2",)
    assert plan.scores["layers.1"] == 0
    others = max(plan.scores["layers.0"], plan.scores["layers.3"])
    assert plan.scores["layers.2"] > 10 * abs(others)


@pytest.mark.parametrize(
    ("adapters", "scale"),
    [(1, 0.5), (2, 0.5**0.5), (4, 1.0)],
)
def test_the_first_step_of_all_sites_is_as_long_as_their_rate(adapters, scale):
    """AdamW's first step is the rate in each weight, whatever the gradient; its eps takes some 1e-3 of it."""
    rule, net = Integrated(), Net()
    sites = find_sites(net, LORA).sites
    with probed(net, LORA, sites, batches=batches(5), steps=5, seed=0, loss_fn=squared) as stage:
        rated = replace(stage, learning_rate=0.05)
        next(rule.score(rated, (1,), Budget.of_count(adapters, n=4)))
        moved = [b.detach().abs().mean().item() for b in stage.parameters("lora_B")]
    assert moved == pytest.approx([0.05 * scale] * 4, rel=1e-2)


@pytest.mark.parametrize(("own", "head_learning_rate"), [(None, 0.05), (0.3, 0.3)])
def test_a_head_keeps_its_rate_where_adapters_have_a_part_of_it(own, head_learning_rate):
    net, head = Net(), torch.nn.Parameter(torch.zeros(2))
    with probed(net, LORA, find_sites(net, LORA).sites, batches=[], steps=1, seed=0, loss_fn=squared) as stage:
        rated = replace(stage, head=[head], head_learning_rate=own)
        optimizer = rated.optimizer(stage.parameters("lora_B"), 0.05, scale=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, head_learning_rate]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"most_ranks": 1}, "most_ranks with per='site'"),
        ({"per": "rank", "most_ranks": 0}, "most_ranks=0"),
        ({"per": "rank", "most_ranks": "uneven"}, "most_ranks='uneven'"),
        ({"head_steps": -1}, "-1"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(OptionError, match=named):
        Integrated(**settings)


@pytest.mark.slow
def test_it_runs_on_minilm_and_another_seed_draws_another_start(minilm, review_batches):
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")
    options = {"lora": lora, "parameters": 0.25, "steps": 4, "rule": Quick(head_steps=0), "progress": False}
    plans = [select(minilm, review_batches, seed=seed, **options) for seed in (0, 0, 1)]
    assert plans[0].scores == plans[1].scores != plans[2].scores
    assert 0 < plans[0].parameters <= plans[0].lora_parameters / 4
    assert not lora_layers(minilm)


# -- single ranks ----------------------------------------------------------------------------------------------------


def test_the_scores_of_single_ranks_add_up_to_those_of_whole_sites():
    data = batches(10)
    whole, single = selected(Integrated(), data=data), selected(Integrated(per="rank"), data=data)
    assert single.scores == pytest.approx(whole.scores, rel=1e-4, abs=1e-7)  # a rotation in fp32
    assert single.parameters <= 2 * whole.lora_parameters / 4  # adapters=2 of four adapters
    assert sum(single.ranks.values()) > 0


def test_a_gain_of_rank_one_is_kept_with_one_rank():
    """The target differs from the net by a product of two vectors in layer 2: its second rank has nothing to learn."""
    teacher = Branches()
    with torch.no_grad():
        torch.manual_seed(5)
        teacher.layers[2].weight += 0.3 * torch.outer(torch.randn(6), torch.randn(6)).double()
        data = [{"x": x, "y": teacher(x)} for x in [torch.randn(16, 24).double() for _ in range(64)]]
    scores = {}

    class Watched(Integrated):
        def score(self, stage, steps, budget):
            for done, found in super().score(stage, steps, budget):
                scores.update(zip(stage.layers, found.ranks, strict=True))
                yield done, found

    with pytest.warns(WeightLoraWarning, match=r"had no gradient in the scoring, layers\.1"):
        selected(Watched(per="rank"), steps=60, data=data, parameters=0.9, model=Branches())
    first, second = scores["layers.2"]
    assert first > 20 * abs(second)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("most", [1, 2, 9])
def test_a_site_keeps_at_most_so_many_ranks(most, minilm, review_batches):
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")
    asked = {"lora": lora, "parameters": 0.5, "steps": 4, "progress": False}
    plan = select(minilm, review_batches, rule=Quick(head_steps=0, per="rank", most_ranks=most), **asked)
    free = select(minilm, review_batches, rule=Quick(head_steps=0, per="rank"), **asked)
    assert plan.scores == free.scores
    assert max(plan.ranks.values()) <= most
    assert most < 4 or plan.ranks == free.ranks
    assert max(free.ranks.values()) > 2  # the control


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("parameters", "most"), [(0.25, 1), (0.3, 2), (0.5, 2), (0.75, 3), (0.9, 4), (20_000, 1)])
def test_even_ranks_are_the_budgets_share_of_each_site(parameters, most, minilm, review_batches):
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")
    rule = Quick(head_steps=0, per="rank", most_ranks="even")
    plan = select(minilm, review_batches, lora=lora, parameters=parameters, steps=4, rule=rule, progress=False)
    assert max(plan.ranks.values()) == most
    assert plan.parameters <= (20_000 if parameters == 20_000 else parameters * plan.lora_parameters)
    if parameters == 0.25:  # every site whose best rank saved anything
        assert len(plan.names) > 30


def test_a_plan_of_single_ranks_is_stock_peft(minilm, review_batches, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")
    rule = Quick(head_steps=0, per="rank")
    plan = select(minilm, review_batches, lora=lora, parameters=0.25, steps=4, rule=rule, seed=0, progress=False)
    assert len({r for r in plan.ranks.values() if r}) > 1
    assert plan.parameters <= plan.lora_parameters / 4
    model = plan.attach(minilm)
    for name, layer in lora_layers(model).items():
        assert layer.r["default"] == plan.ranks[name]
        assert layer.scaling["default"] == 2.0  # lora_alpha/r
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
        logits = model(**review_batches[0]).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(model.unload(), tmp_path)
        torch.testing.assert_close(again(**review_batches[0]).logits, logits, rtol=0, atol=0)
    with pytest.raises(OptionError, match=r"single ranks are chosen within .*, not within time=0.8"):
        selected(Integrated(per="rank"), time=0.8)
