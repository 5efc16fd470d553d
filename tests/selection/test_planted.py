"""A real encoder with a block whose query, key and value compute what nothing reads: every rule by the loss sees it."""

import pytest
import torch
from peft import LoraConfig
from selecting import BY_GRADIENT, BY_INPUTS

from weightlora.errors import WeightLoraWarning
from weightlora.selection.rules import rule_of
from weightlora.selection.select import select

OUTPUT = "bert.encoder.layer.4.attention.output.dense"
DEAD = {f"bert.encoder.layer.4.attention.self.{name}" for name in ("query", "key", "value")}
BY_LOSS = (
    "first_order",
    "pursuit",
    "integrated",
    "integrated_ranks",
    *(path for name, path in BY_GRADIENT.items() if name != "aletheia"),  # which keeps whole blocks
)
BLIND = ("kappa_tune", "stratified", *BY_INPUTS.values())


def plan_of(rule, model, batches, parameters):
    with torch.no_grad():
        model.get_submodule(OUTPUT).weight.zero_()
    lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", exclude_modules=[OUTPUT])
    asked = {"lora": lora, "parameters": parameters, "steps": 4, "progress": False}
    return select(model, batches, rule=rule_of(rule, head_steps=0) if rule in BY_LOSS else rule, **asked)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rule", BY_LOSS)
def test_dead_layers_score_nothing_and_are_not_kept(rule, minilm, review_batches):
    with pytest.warns(WeightLoraWarning, match="3 of 35 sites had no gradient in the scoring"):
        plan = plan_of(rule, minilm, review_batches * 2, parameters=0.1)
    assert {name for name, score in plan.scores.items() if score == 0} == DEAD
    assert not DEAD & {*plan.names}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rule", BLIND)
def test_rules_that_do_not_read_the_loss_miss_it(rule, minilm, review_batches):
    """The control: dead layers can be kept."""
    assert DEAD & {*plan_of(rule, minilm, review_batches * 2, parameters=0.9).names}
