"""The user's learning rate is LoRA's: lower ranks are trained at the rate that they want."""

import pytest
from transformers import Trainer

import weightlora
from weightlora.errors import WeightLoraWarning
from weightlora.trainer.attach import adopt

#: Four sites of rank 4, q and v of two layers: a quarter of the parameters is rank 1 on all.
WANTED = [(0.75, 1e-2), (0.5, 1e-2), (0.25, 2e-2), (0.1, 2e-2)]


def trained(trainer: Trainer) -> list[tuple[str, bytes]]:
    trainer.train()
    return [(name, p.detach().numpy().tobytes()) for name, p in trainer.model.named_parameters()]


@pytest.mark.parametrize(("parameters", "rate"), WANTED)
def test_the_trainer_gets_the_rate_that_the_ranks_want(make_tiny, parameters, rate):
    trainer = make_tiny()
    plan = weightlora.select_for(trainer, parameters=parameters, progress=False)
    assert trainer.args.learning_rate == pytest.approx(rate)
    assert trainer.create_optimizer().param_groups[0]["lr"] == pytest.approx(rate)
    assert rate == pytest.approx(1e-2 * plan.learning_rate_factor)
    assert ("about 2 times LoRA's, which select_for sets" in str(plan)) == (rate == 2e-2)


def test_the_training_is_that_of_lora_of_this_rank_at_this_rate(make_tiny):
    """Bit for bit, once both start from the same A; at the user's own rate it is another."""
    low = {"r": 1, "lora_alpha": 2}
    selected = make_tiny("selected")
    weightlora.select_for(selected, parameters=0.25, progress=False)
    lora, slow = make_tiny("lora", lora=low, learning_rate=2e-2), make_tiny("slow", lora=low)
    for other in (lora, slow):
        other.model.load_state_dict(selected.model.state_dict())
    ends = [trained(trainer) for trainer in (selected, lora, slow)]
    assert ends[0] == ends[1] != ends[2]


def test_a_second_start_in_the_folder_and_a_plan_that_is_given_do_the_same_once(make_tiny):
    plan = weightlora.select_for(make_tiny(), parameters=0.25, progress=False)
    again = make_tiny()
    assert weightlora.select_for(again, parameters=0.25, progress=False) == plan
    given = make_tiny("given")
    adopt(given, plan, seed=0)
    assert again.args.learning_rate == given.args.learning_rate == pytest.approx(2e-2)


@pytest.mark.parametrize("limits", [{"adapters": 1}, {"parameters": 0.1}])
def test_whole_layers_are_trained_at_the_users_rate(make_tiny, limits):
    """Their factor is advice."""
    trainer = make_tiny(lora={"target_modules": "all-linear"})
    plan = weightlora.select_for(trainer, **limits, rule="stratified", progress=False)
    assert plan.learning_rate_factor == 2
    assert "select_for sets" not in str(plan)
    assert trainer.args.learning_rate == 1e-2


def test_deepspeed_keeps_the_rate_that_it_was_told_and_a_warning_says_what_to_set(make_tiny, monkeypatch):
    trainer = make_tiny()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plan = weightlora.select_for(make_tiny("other"), parameters=0.25, progress=False)
    with pytest.warns(WeightLoraWarning, match="the plan's ranks want 2 times the rate of LoRA.*set 0.02 yourself"):
        adopt(trainer, plan, seed=0)
    assert trainer.args.learning_rate == 1e-2
