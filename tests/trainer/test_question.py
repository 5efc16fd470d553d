"""A stored plan is used for the very question that it was made for; whatever else is asked is one line."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from selecting import STUDY
from small_models import tiny_llama, tiny_rows
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import weightlora
from weightlora.errors import OptionError
from weightlora.plan.limits import LIMITS
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.rules.first_order import FirstOrder
from weightlora.selection.rules.paper import StoIHT
from weightlora.trainer._question import weights_fingerprint

ASKED = {"adapters": 2, "rule": StoIHT(head_steps=0), "steps": 2}


def scaled():
    """One weight matrix of one layer is another."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    return model


#: One thing of the question each: what is changed, and the words for it.
CHANGES = {
    "r": ({"lora": {"r": 8}}, "r=4 there, 8 now"),
    "lora_alpha": ({"lora": {"lora_alpha": 16}}, "lora_alpha=8 there, 16 now"),
    "lora_dropout": ({"lora": {"lora_dropout": 0.1}}, r"lora_dropout=0.0 there, 0.1 now"),
    "target_modules": (
        {"lora": {"target_modules": ["q_proj", "k_proj"]}},
        r"target_modules=\['q_proj', 'v_proj'\] there, \['k_proj', 'q_proj'\] now",
    ),
    "rank_pattern": ({"lora": {"rank_pattern": {"q_proj": 2}}}, r"rank_pattern=\{\} there, \{'q_proj': 2\} now"),
    "alpha_pattern": ({"lora": {"alpha_pattern": {"q_proj": 2}}}, r"alpha_pattern=\{\} there, \{'q_proj': 2\} now"),
    "use_rslora": ({"lora": {"use_rslora": True}}, "use_rslora=False there, True now"),
    "use_dora": ({"lora": {"use_dora": True}}, "use_dora=False there, True now"),
    "bias": ({"lora": {"bias": "lora_only"}}, "bias='none' there, 'lora_only' now"),
    "modules_to_save": ({"lora": {"modules_to_save": ["norm"]}}, r"modules_to_save=None there, \['norm'\] now"),
    "exclude_modules": ({"lora": {"exclude_modules": ["layers.0.self_attn.q_proj"]}}, "exclude_modules=None there"),
    "layers_to_transform": ({"lora": {"layers_to_transform": [0]}}, r"layers_to_transform=None there, \[0\] now"),
    "init_lora_weights": ({"lora": {"init_lora_weights": "gaussian"}}, "init_lora_weights=True there, 'gaussian' now"),
    "base weights": ({"model": scaled}, "other base weights"),
    "type of the base": ({"model": lambda: tiny_llama().bfloat16()}, "other base weights"),
    "adapters": ({"adapters": 1}, "adapters=2 there, 1 now"),
    "rule": ({"rule": "kappa_tune"}, "rule='paper' there, 'kappa_tune' now"),
    "a rule of one's own": (
        {"rule": STUDY["fisher"]},
        "rule='paper' there, 'benchmarks.choice.rules.adapter_gradients:Fisher' now",
    ),
    "a rule's setting": ({"rule": StoIHT(head_steps=0, gate_lr=2.0)}, "gate_lr=5.0 there, 2.0 now"),
    "steps": ({"steps": 3}, "steps=2 there, 3 now"),
    "a large learning rate": ({"learning_rate": 1.0}, "learning_rate=0.01 there, 1.0 now"),
    "learning_rate": ({"learning_rate": 0.1}, "learning_rate=0.01 there, 0.1 now"),
    "head_learning_rate": ({"head_learning_rate": 1.0}, "head_learning_rate=0.01 there, 1.0 now"),
    "seed": ({"seed": 4}, "seed=3 there, 4 now"),
    "fast": ({"fast": "rank"}, "fast=None there, 'rank' now"),
    "ranking": ({"ranking": "spread"}, "ranking='score' there, 'spread' now"),
    "another limit": ({"adapters": None, "parameters": 0.5}, "adapters=2 there, None now; parameters=None there, 0.5"),
    "a limit more": ({"time": 1.0}, "time=None there, 1.0 now"),
    "loss_fn": ({"loss_fn": lambda model, step: model(**step[0][0]).loss}, "own_loss=False there, True now"),
    "training rows": ({"rows": tiny_rows()[12:] + tiny_rows()[:12]}, "other training data"),
    "order of the rows": ({"rows": tiny_rows()[::-1]}, "other training data"),
    "one more row": ({"rows": tiny_rows(25)}, "train_rows=24 there, 25 now"),
    "length of the rows": ({"rows": [{k: v[:6] for k, v in r.items()} for r in tiny_rows()]}, "other training data"),
    "batch size": ({"per_device_train_batch_size": 4}, "rows_per_step=2 there, 4 now"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "rows_per_step=2 there, 4 now"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.0 there, 0.1 now"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=None there, 5.0 now"),
    "precision": ({"bf16": True}, "bf16=False there, True now"),
}
#: What may change between two starts of one run.
SAME = {
    "nothing": {},
    "more training steps": {"max_steps": 4},
    "what is logged and saved": {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1},
    "the same options, typed": {"learning_rate": 0.01, "head_learning_rate": 0.01, "seed": 3, "ranking": "score"},
    "the batch, accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
}
_PLAN = (*LIMITS, "rule", "steps", "learning_rate", "head_learning_rate", "fast", "ranking", "loss_fn")


@pytest.fixture
def ask(make_tiny):
    """Asks for the plan of a trainer with some things changed; returns the trainer and the plan."""

    def ask(folder="run", model=None, **changed):
        options = {k: changed.pop(k) for k in _PLAN if k in changed}
        trainer = make_tiny(folder, model=model and model(), **changed)
        return trainer, weightlora.select_for(trainer, **{**ASKED, **options})

    return ask


def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("what", CHANGES)
def test_another_question_is_one_line_that_names_it(ask, tmp_path, what):
    changed, words = CHANGES[what]
    _, plan = ask()
    (tmp_path / "run" / "checkpoint-1").mkdir()  # a training has used the plan
    with pytest.raises(OptionError, match=words) as caught:
        ask(**changed)
    assert "\n" not in str(caught.value)
    assert "choose another output_dir, or delete that file" in str(caught.value)
    assert AdapterPlan.load(tmp_path / "run" / "plan.json") == plan
    ask("elsewhere", **changed)  # the control: it is a question that can be asked


@pytest.mark.parametrize("limit", [{"parameters": 0.5}, {"memory": "1GB"}, {"adapters": 3}])
def test_limits_can_be_tried_one_after_the_other_until_something_is_trained(ask, tmp_path, caplog, limit):
    """README's snippet run again with another limit."""
    caplog.set_level(logging.WARNING, "weightlora")
    limit = {"adapters": None, **limit}
    _, first = ask()
    trainer, plan = ask(**limit)
    assert plan != first
    assert AdapterPlan.load(tmp_path / "run" / "plan.json") == plan
    assert "made for something else" in caplog.text
    assert "nothing is trained with it: it is replaced" in caplog.text
    assert "\n" not in caplog.messages[-1]
    caplog.clear()
    assert ask(**limit)[1] == plan  # used again, in silence
    assert "replaced" not in caplog.text
    trainer.train()
    trainer.save_model()  # the adapter alone: the folder has no checkpoint
    with pytest.raises(OptionError, match="made for something else"):
        ask()


def test_a_plan_that_no_trainer_wrote_is_never_replaced(ask, tmp_path):
    _, plan = ask()
    replace(plan, question={}).save(tmp_path / "run" / "plan.json")
    with pytest.raises(OptionError, match="does not record what it was made for"):
        ask(adapters=3)


@pytest.mark.parametrize("what", SAME)
def test_the_same_question_takes_the_plan_without_scoring(ask, monkeypatch, what):
    first, plan = ask()
    expected = trained(first)
    monkeypatch.setattr("weightlora.methods.families.selecting.selected", lambda *_, **__: pytest.fail("scored again"))
    again, same = ask(**SAME[what])
    assert same == plan
    if what == "nothing":
        weights = trained(again)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        ask("elsewhere")  # the control


@pytest.mark.filterwarnings("ignore:adapters=1.0")
def test_one_adapter_and_all_of_them_are_two_questions(ask, tmp_path):
    ask(adapters=1)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    with pytest.raises(OptionError, match=r"adapters=1 there, 1.0 now"):
        ask(adapters=1.0)


def test_a_plan_that_says_not_what_for_is_not_taken(ask, tmp_path):
    _, plan = ask("elsewhere")
    data = json.loads((tmp_path / "elsewhere" / "plan.json").read_text())
    assert data.pop("question")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text(json.dumps(data))  # as select() writes it
    with pytest.raises(OptionError, match=r"does not record what it was made for.*plan.attach") as caught:
        ask()
    assert "\n" not in str(caught.value)
    assert AdapterPlan.load(tmp_path / "run" / "plan.json") == plan


def test_a_new_head_without_a_seed_and_a_model_that_ran_are_the_same_question(tmp_path, tokenizer):
    def start(seed):
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        model = AutoModelForSequenceClassification.from_config(
            LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, num_labels=3)
        )
        torch.manual_seed(seed)
        nn.init.normal_(model.score.weight)
        model(torch.arange(6)[None])
        rows = [{"input_ids": row["input_ids"], "label": i % 3} for i, row in enumerate(tiny_rows())]
        arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        plan = weightlora.select_for(trainer, lora=lora, adapters=1, steps=2, rule=FirstOrder(head_steps=1))
        return trainer, plan

    first, plan = start(1)
    second, same = start(2)
    assert same == plan
    heads = [t.model.base_model.model.score.original_module.weight for t in (first, second)]
    assert not torch.equal(*heads)  # the control


# -- the base weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_weights_that_are_offloaded_are_the_same_weights(offload, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM")
    expected = weights_fingerprint(tiny_llama(), lora)

    def of(model, folder):
        where = {} if offload is cpu_offload else {"offload_dir": tmp_path / folder}
        return weights_fingerprint(offload(model, execution_device=torch.device("cpu"), **where), lora)

    assert of(tiny_llama(), "same") == expected
    assert of(scaled(), "other") != expected


def test_the_packed_numbers_and_the_scales_of_quantised_weights_count(quantised_net):
    before = weights_fingerprint(quantised_net, LoraConfig())
    assert weights_fingerprint(quantised_net, LoraConfig()) == before
    weight = quantised_net[2].weight
    scales = weight.quant_state.absmax if "quant_state" in vars(weight) else weight.SCB
    scales.add_(1)
    scaled_up = weights_fingerprint(quantised_net, LoraConfig())
    scales.sub_(1)
    weight.data[0] += 1
    assert len({before, scaled_up, weights_fingerprint(quantised_net, LoraConfig())}) == 3


def test_reading_the_weights_changes_nothing_and_adapters_around_them_do_not_count():
    model, lora = tiny_llama().bfloat16(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights, numbers = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    before = weights_fingerprint(model, lora)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert weights_fingerprint(get_peft_model(model, lora), lora) == before
    assert weights_fingerprint(tiny_llama(), lora) != before  # the control
    with torch.device("meta"):
        empty = tiny_llama()
    assert weights_fingerprint(empty, lora) == weights_fingerprint(empty, lora)
