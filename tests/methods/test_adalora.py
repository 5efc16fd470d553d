"""AdaLoRA: the allocator runs, prunes as written down, and a trainer without it is not silent."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

from weightlora.errors import DataError, OptionError, SelectionError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.methods.adalora import cubic_budget
from weightlora.model.layers import lora_layers

STEPS = 12
SCHEDULE = {"init_r": 4, "tinit": 2, "tfinal": 3, "deltaT": 2}
LORA = LoraConfig(r=2, lora_alpha=6)
SITES = 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5))


def batch(step):
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step))


def train(method, model, steps=STEPS, acts=True, note=id):
    """A loop of one's own around the mover; returns nothing, the model is trained."""
    (callback,) = method.callbacks()
    if acts:
        callback.mover.before_training(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(1, steps + 1):
        (model(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        if acts:
            callback.mover.after_step(step)
        note(step)
        optimizer.zero_grad()


def attached(**options):
    torch.manual_seed(1)
    method = make_method("adalora", **{**SCHEDULE, **options})
    return method, method.attach(net(), LORA, [], STEPS)


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_the_budget_is_the_cubic_curve_at_steps_that_prune():
    """Ranks 12 → 6 between steps 2 and 9, at even steps and at step 9; in between all may come back."""
    method, model = attached()
    seen = {}
    train(method, model, note=lambda step: seen.update({step: sum(method.plan.ranks.values())}))
    curve = {t: int(6 + 6 * (1 - (t - 2) / 7) ** 3) for t in (4, 6, 8)}
    assert seen == {1: 12, 2: 12, 3: 12, 4: curve[4], 5: 12, 6: curve[6], 7: 12, 8: curve[8], 9: 6, 10: 6, 11: 6, 12: 6}
    assert seen == {step: method.most_ranks(step) for step in range(1, STEPS + 1)}


def test_the_curve_is_pefts_own():
    _, model = attached()
    allocator = model.base_model.rankallocator
    for step in range(1, STEPS + 1):
        own = cubic_budget(step, begin=2, end=STEPS - 3, high=12, low=6)
        assert own == allocator.budget_schedule(step)[0]


def test_the_ranks_are_those_of_a_slow_reference():
    """S = Ī·Ū of every entry; a triplet's score is that of e and the means of those of its row of A and column of B."""
    method, model = attached()
    (callback,) = method.callbacks()
    callback.mover.before_training(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    average, spread, compared = {}, {}, []
    for step in range(1, STEPS - 3 + 1):
        (model(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        for name, weight in model.named_parameters():
            if ".lora_" in name and step < STEPS - 3:  # the last pruning uses the averages of the step before
                now = (weight.detach() * weight.grad).abs()
                average[name] = 0.85 * average.get(name, 0) + 0.15 * now
                spread[name] = 0.85 * spread.get(name, 0) + 0.15 * (now - average[name]).abs()
        callback.mover.after_step(step)
        optimizer.zero_grad()
        if method.most_ranks(step) < SITES * 4:
            compared.append(step)
            scores = {name: average[name] * spread[name] for name in average}
            assert method.plan.ranks == slow_ranks(scores, method.most_ranks(step))
    assert compared == [4, 6, 8, 9]
    assert len(set(method.plan.ranks.values())) > 1, "ranks differ"


def slow_ranks(scores, budget):
    """How many triplets of each site are among the ``budget`` best of all."""
    triplets = []
    for name in scores:
        if ".lora_E." not in name:
            continue
        a, b = (scores[name.replace("lora_E", other)] for other in ("lora_A", "lora_B"))
        for j in range(len(a)):
            row, column = [float(x) for x in a[j]], [float(x) for x in b[:, j]]
            score = float(scores[name][j]) + sum(row) / len(row) + sum(column) / len(column)
            triplets.append((score, name.removeprefix("base_model.model.").removesuffix(".lora_E.default")))
    best = [name for _, name in sorted(triplets, reverse=True)[:budget]]
    return {name: best.count(name) for name in {name for _, name in triplets}}


# -- the export ------------------------------------------------------------------------------------------------------


def test_the_export_is_stock_lora_of_the_triplets_that_are_left(tmp_path):
    method, model = attached()
    train(method, model)
    x = batch(99)
    with torch.no_grad():
        before = model(x)
        by_hand = {
            n: layer.scaling["default"]
            / (4 + 1e-5)
            * layer.lora_B["default"]
            @ (layer.lora_E["default"] * layer.lora_A["default"])
            for n, layer in lora_layers(model).items()
        }
    exported = method.export(model)
    torch.testing.assert_close(exported(x), before, atol=1e-6, rtol=0)
    assert sum(method.plan.ranks.values()) == SITES * 2
    assert method.plan.parameters == sum(p.numel() for n, p in exported.named_parameters() if ".lora_" in n)
    for name, layer in lora_layers(exported).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), by_hand[name], atol=1e-6, rtol=0)
    exported.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(net(), str(tmp_path))(x), exported(x))


def test_alpha_goes_with_the_rank_unless_it_is_kept():
    """r = 2, alpha = 6: plain LoRA's strength is 3; with alpha kept it is 6/4."""
    for alpha, strength in (("scale", 3.0), ("keep", 1.5)):
        _, model = attached(alpha=alpha)
        for layer in lora_layers(model).values():
            assert layer.scaling["default"] / layer.ranknum["default"].item() == pytest.approx(strength)


# -- nothing is silent -----------------------------------------------------------------------------------------------


def test_training_without_the_callback_warns_and_cannot_be_exported():
    method, model = attached()
    with pytest.warns(WeightLoraWarning, match="adalora is being trained, but its callback is missing: give the tr"):
        train(method, model, acts=False)
    with pytest.raises(SelectionError, match="adalora has 12 ranks left, 6 are the budget: it did not run"):
        method.export(model)


def test_a_training_that_ended_early_cannot_be_exported():
    method, model = attached()
    train(method, model, steps=5)
    with pytest.raises(SelectionError, match="it did not run to the end"):
        method.export(model)


def test_evaluating_warns_of_nothing():
    _, model = attached()
    model.eval()(batch(0))
    with torch.no_grad():
        model.train()(batch(0))


def test_a_site_without_a_gradient_is_pruned_and_no_crash():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    method = make_method("adalora", **SCHEDULE)
    model = method.attach(Idle(), LORA, [], STEPS)
    train(method, model)
    method.export(model)
    assert method.plan.ranks == {"idle": 0, "used": 4}


@pytest.mark.parametrize(
    ("options", "lora", "text"),
    [
        ({"init_r": 2}, LORA, "init_r=2 is not allowed: give more than r=2"),
        ({"tinit": 9}, LORA, "tinit=9 and tfinal=3 leave none of 12 steps for pruning"),
        ({"deltaT": 0}, LORA, "deltaT=0 is not allowed"),
        ({"alpha": "x"}, LORA, "alpha='x' is not allowed"),
        ({}, LoraConfig(r=2, rank_pattern={"0": 4}), "adalora gives every site the same rank"),
    ],
)
def test_a_value_out_of_range_is_one_line(options, lora, text):
    with pytest.raises(OptionError, match=text):
        make_method("adalora", **{**SCHEDULE, **options}).attach(net(), lora, [], STEPS)


def trainer(folder, method, steps, **arguments):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = method.attach(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)), LORA, [], STEPS)
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_steps": 2, "logging_strategy": "no"}
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 64
    given = TrainingArguments(str(folder), max_steps=steps, **{**quiet, **arguments})
    return Trainer(model, given, train_dataset=rows, callbacks=method.callbacks())


def test_another_number_of_steps_is_refused(tmp_path):
    with pytest.raises(OptionError, match="attached for 12 steps and the training takes 4"):
        trainer(tmp_path, make_method("adalora"), 4).train()


def test_the_weights_of_another_step_are_refused(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch"
    )
    method, _ = attached()
    (callback,) = method.callbacks()
    with pytest.raises(OptionError, match="load_best_model_at_end would end with the ranks of an earlier step"):
        callback.on_train_begin(arguments, TrainerState(max_steps=STEPS), TrainerControl())


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    trainer(tmp_path, make_method("adalora"), STEPS).train()
    (tmp_path / "checkpoint-4" / "method_state.safetensors").unlink()
    with pytest.raises(DataError, match=r"checkpoint-4/method_state\.safetensors is missing"):
        trainer(tmp_path, make_method("adalora"), STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_scale_is_not_trained_in_half_precision_either():
    """PEFT's ``ranknum``, which the scale is divided by, becomes a trained parameter there; no checkpoint holds it."""
    method = make_method("adalora", **SCHEDULE)
    model = method.attach(net().to(torch.bfloat16), LORA, [], STEPS)
    for layer in lora_layers(model).values():
        assert not layer.ranknum["default"].requires_grad
        assert layer.ranknum["default"].dtype == torch.float32
        assert layer.ranknum["default"].item() == 4
