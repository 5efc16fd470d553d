"""A training whose loss has not fallen says so at its end."""

import json
import math
import random
import re

import pytest
from small_run import words
from transformers import TrainerCallback

from weightlora.errors import WeightLoraWarning
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train

DRAWS = random.Random(0)
NOISE = [DRAWS.gauss(0, 0.02) for _ in range(20)]
FALLING = [1.4 - 0.02 * i + noise for i, noise in enumerate(NOISE)]


@pytest.mark.parametrize(
    "losses",
    [
        FALLING,
        [0.7, *[0.01] * 19],  # all of the fall is in the first loss
        [1.4 - 0.001 * i for i in range(20)],  # slow and sure
        [1.4] * 9,  # too few to say
        [math.nan] * 9,
        [],
    ],
)
def test_a_loss_that_has_fallen_or_is_hardly_logged_is_not_talked_about(losses):
    from weightlora.runs._trainable import loss_fault

    assert loss_fault(losses, 1e-3) is None


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([1.4] * 20, "not fallen: 1.4 in the first fifth of the training, 1.4 in the last.*try a higher learning_rate"),
        ([1.4 + noise for noise in NOISE], "not fallen.*learning_rate=0.001.*try a higher"),
        (FALLING[::-1], "not fallen.*try a lower"),
        ([1.4, *[math.nan] * 19], "no finite number.*try a lower"),
        ([math.inf] * 10, "no finite number.*try a lower"),
    ],
)
def test_one_that_has_not_is_one_line(losses, says):
    from weightlora.runs._trainable import loss_fault

    told = loss_fault(losses, 1e-3)
    assert told is not None
    assert re.search(says, told)
    assert "\n" not in told


def quick(base, output, **changed):
    plain = {"method": "lora", "adapters": None, "steps": None, "rule_options": None}
    return read_recipe(words=words(base, output, max_steps=10, save_strategy="no", **plain, **changed)[1:])


def test_train_says_it_and_keeps_the_run(base, tmp_path):
    with pytest.warns(WeightLoraWarning, match=r"the loss has not fallen.*learning_rate=1e-12"):
        train(quick(base, tmp_path, learning_rate=1e-12))
    assert len(json.loads((tmp_path / "results.json").read_text())["losses"]) == 10


class Broken(TrainerCallback):
    """From its third step on a weight is NaN."""

    def on_step_begin(self, _args, state, _control, model=None, **_):
        if state.global_step == 2:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_loss_that_the_trainer_filters_is_seen_by_its_gradient(base, tmp_path):
    """transformers logs the mean of other steps in the place of a loss that is NaN, or 0."""
    with pytest.warns(WeightLoraWarning, match=r"no finite number.*try a lower"):
        train(quick(base, tmp_path), callbacks=[Broken()])
