"""Selecting restores the model bit for bit, whatever happens.

`fingerprint` is what "as it was" means here; it is first shown to notice every kind of change.
"""

import random
from contextlib import suppress
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from selecting import fingerprint, ruled
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from weightlora import select
from weightlora.fast.enable import fast_dropout
from weightlora.model.restore import untouched

TOKENS = {"input_ids": torch.arange(32).reshape(4, 8), "labels": torch.tensor([0, 1, 1, 0])}


def bert():
    """In eval mode, partly frozen, with gradients and a user's hook: everything that could get lost."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)).eval()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].train()
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
    model(**TOKENS).loss.backward()
    return model


def lora_bert():
    """A PEFT model in the middle of its training: B is not zero."""
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "dense"], init_lora_weights=False)
    model = get_peft_model(bert(), config)
    model(**TOKENS).loss.backward()
    return model


def checkpointed_bert():
    model = bert()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class NormedBert(nn.Module):
    """No transformers model, with buffers that every forward pass in train mode changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.bert = bert()
        self.score = nn.Linear(16, 2)

    def forward(self, input_ids, labels):
        hidden = self.norm(self.bert.bert(input_ids).pooler_output)
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.score(hidden), labels))


MODELS = [bert, lora_bert, checkpointed_bert, NormedBert]


def new_value(model):
    with torch.no_grad():
        weight = model.bert.encoder.layer[0].output.dense.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def new_parameter(model):
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().clone())


def new_module(model):
    model.bert.encoder.layer[0].output.dense = deepcopy(model.bert.encoder.layer[0].output.dense)


def added_module(model):
    model.bert.add_module("extra", nn.Identity())


def removed_hook(model):
    model.bert.encoder.layer[0].output.dense._forward_hooks.clear()


def added_backward_hook(model):
    model.bert.register_full_backward_hook(lambda *_: None)


def new_mode(model):
    model.bert.encoder.layer[0].output.dropout.train()


def frozen(model):
    model.classifier.weight.requires_grad_(False)


def no_gradient(model):
    model.classifier.weight.grad = None


def equal_gradient_elsewhere(model):
    model.classifier.weight.grad = model.classifier.weight.grad.clone()


def new_buffer_value(model):
    model.bert.embeddings.position_ids += 1


def new_buffer(model):
    model.bert.embeddings.position_ids = model.bert.embeddings.position_ids.clone()


def new_config(model):
    model.config.num_hidden_layers = 7


def new_attribute(model):
    model.peft_config = {}


def python_random(_):
    random.random()


def numpy_random(_):
    np.random.rand()


def torch_random(_):
    torch.rand(1)


UNDONE = [
    *(new_parameter, new_module, added_module, removed_hook, added_backward_hook, new_mode, frozen, no_gradient),
    *(equal_gradient_elsewhere, new_buffer_value, new_buffer, new_config, new_attribute),
    *(python_random, numpy_random, torch_random),
]


@pytest.mark.parametrize("change", [new_value, *UNDONE])
def test_fingerprint_notices(change):
    model = bert()
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("change", UNDONE)
def test_untouched_undoes(change):
    model = bert()
    before = fingerprint(model)
    with suppress(KeyboardInterrupt), untouched(model, seed=0):
        change(model)
        raise KeyboardInterrupt
    assert fingerprint(model) == before


def test_random_numbers_inside_depend_on_the_seed_alone():
    def draw(outer, seed):
        for module in (random, np.random):
            module.seed(outer)
        torch.manual_seed(outer)
        with untouched(nn.Identity(), seed=seed):
            return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(outer=1, seed=7) == draw(outer=2, seed=7)
    assert all(a != b for a, b in zip(draw(outer=1, seed=7), draw(outer=1, seed=8), strict=True))


def interrupted(error):
    """A loss that breaks in the fourth call: after two steps of the head, in the second step of the gates."""
    calls = []

    def loss(model, batch):
        calls.append(torch.rand(1))  # the random states move as well
        if len(calls) == 4 and error:
            raise error
        return model(**batch).loss

    return loss


def run(model, rule, error, **options):
    lora = None if hasattr(model, "peft_config") else LoraConfig(r=2, modules_to_save=["classifier", "score"])
    arguments = {"steps": 3, "head_steps": 2, "rule": rule, "adapters": 2, "lora": lora, "progress": False, **options}
    return select(model, [TOKENS] * 5, loss_fn=interrupted(error), **ruled(**arguments))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("rule", ["first_order", "paper"])
@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_select_leaves_the_model_untouched(make, rule, error):
    model = make()
    before = fingerprint(model)
    if error is None:
        assert len(run(model, rule, error).names) == 2
    else:
        with pytest.raises(type(error)):
            run(model, rule, error)
    assert fingerprint(model) == before


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_scoring_does_touch_the_model_while_it_runs(make):
    """Negative control of the test above: there was something to undo, in the modules and in the random states."""
    model, changed = make(), set()
    before = fingerprint(model)

    def loss(model, batch):
        now = fingerprint(model)
        changed.update(part for part in now if now[part] != before[part])
        assert all(module.training for module in model.modules())
        return model(**batch).loss

    select(model, [TOKENS] * 2, lora=LoraConfig(r=2), steps=2, adapters=1, loss_fn=loss, progress=False)
    assert {"tree", "attributes", "parameters", "random"} <= changed
    assert ("buffers" in changed) == (make is NormedBert)


def test_select_leaves_minilm_untouched(minilm, review_batches):
    before = fingerprint(minilm)
    config = LoraConfig(r=4, task_type="SEQ_CLS")
    plan = select(minilm, review_batches, lora=config, steps=4, **ruled("paper", head_steps=2), progress=False)
    assert len(plan.names) == 18
    assert fingerprint(minilm) == before


def test_a_users_hook_survives_and_can_still_be_removed():
    model, calls = bert(), []
    layer = model.bert.encoder.layer[0].output.dense
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    run(model, "paper", None)
    calls.clear()
    model(**TOKENS)
    handle.remove()
    model(**TOKENS)
    assert len(calls) == 1


@pytest.mark.parametrize("names", [("other",), ("default", "second"), ("first", "second")], ids="+".join)
def test_every_adapter_of_a_peft_model_survives(names):
    """Names that may clash with the adapter of the scoring, and adapters that are not active."""
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(bert(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval().set_adapter(names[-1])
    logits = model(**TOKENS).logits
    before = fingerprint(model)
    run(model, "first_order", None, head_steps=0, adapters=1)
    assert fingerprint(model) == before
    assert torch.equal(model(**TOKENS).logits, logits)


@pytest.mark.parametrize("make", [bert, lora_bert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("rule", ["first_order", "paper"])
def test_the_fast_scoring_leaves_the_model_untouched(make, rule):
    model, fast = make(), set()
    before = fingerprint(model)

    def loss(model, batch):
        fast.add(fast_dropout(model))
        return model(**batch).loss

    lora = None if make is lora_bert else LoraConfig(r=2, modules_to_save=["classifier"])
    plan = select(
        model, [TOKENS] * 3, lora=lora, loss_fn=loss, steps=3, adapters=2, **ruled(rule, head_steps=0), fast="rank"
    )
    assert fingerprint(model) == before
    assert fast == {"rank"}  # it was on meanwhile
    assert plan.options["fast"] == "rank"
