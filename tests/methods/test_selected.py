"""Method `selected` with `warm_start`: the training goes on from the weights of the scoring."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from test_choosing import batches, loss, net

from weightlora.errors import OptionError
from weightlora.methods import make_method, options_of
from weightlora.selection.rules.integrated import Integrated
from weightlora.selection.select import select_trained

LORA = LoraConfig(r=2, lora_alpha=6)


class Quick(Integrated):
    """Scores that are read from two batches."""

    probes = 2


RULE = Quick()
OPTIONS = {
    "adapters": 1,
    "rule": RULE,
    "steps": 4,
    "learning_rate": 1e-2,
    "seed": 3,
    "loss_fn": loss,
    "progress": False,
}


def attached(**options):
    method = make_method("selected", **{**OPTIONS, **options})
    return method, method.attach(net(), LORA, batches(6), 100)


def first_loss(model):
    return loss(model, batches(7)[-1]).item()


def test_warm_start_begins_where_the_scoring_ended_and_the_default_at_the_base_model():
    trained = select_trained(net(), batches(6), lora=LORA, **OPTIONS)
    method, warm = attached(warm_start=True)
    cold_method, cold = attached()
    assert first_loss(warm) == first_loss(trained.attach(net()))
    assert first_loss(cold) == first_loss(net())
    assert first_loss(warm) < first_loss(cold)  # the scoring learned something
    assert method.plan.ranks == cold_method.plan.ranks
    assert dict(method.plan.options) == {**cold_method.plan.options, "warm_start": True}


def test_the_result_is_a_stock_checkpoint_on_the_same_base(tmp_path):
    method, warm = attached(warm_start=True)
    optimizer = torch.optim.AdamW([p for p in warm.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        loss(warm, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = method.export(warm)
    exported.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(net(), str(tmp_path))
    x = batches()[0]["x"]
    assert torch.equal(loaded(x), exported(x))
    base = exported.unload().state_dict()
    assert all(torch.equal(base[name], value) for name, value in net().state_dict().items())


@pytest.mark.parametrize("options", [{}, {"rule": "first_order"}, {"rule": "kappa_tune"}])
def test_a_rule_that_trains_nothing_is_refused_before_anything_runs(options):
    with pytest.raises(OptionError, match=r"warm_start=True: rule='.*' trains no adapters"):
        make_method("selected", warm_start=True, **options)
    make_method("selected", warm_start=False, **options)
    make_method("selected", warm_start=True, rule="paper")


def test_a_word_that_is_no_yes_or_no_is_refused():
    with pytest.raises(OptionError, match="warm_start='on' is not allowed: give true or false"):
        make_method("selected", warm_start="on", rule="paper")


def test_ranks_that_grow_cannot_start_warm():
    assert "warm_start" in options_of("selected")
    with pytest.raises(OptionError, match="weightlora_plus has no option 'warm_start'"):
        make_method("weightlora_plus", warm_start=True)
