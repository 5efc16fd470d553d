"""The paper's methods beside ``examples/weightlora_from_scratch.py``: ω after each step, sites, ranks and weights."""

import importlib.util
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from small_models import tiny_llama, tiny_rows
from transformers import Trainer, TrainerCallback, TrainingArguments

import weightlora
from weightlora.errors import OptionError
from weightlora.model.sites import find_sites
from weightlora.tasks.classification import load_classifier
from weightlora.tasks.embedded import minilm as minilm_folder

_EXAMPLE = Path(__file__).parents[2] / "examples" / "weightlora_from_scratch.py"
_SPEC = importlib.util.spec_from_file_location("weightlora_from_scratch", _EXAMPLE)
scratch = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(scratch)

T, RATE, SEED = 3, 1e-2, 3
LORA = {"r": 4, "lora_alpha": 8}
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
#: The rows in their own order, so that a step's rows are plain to see. The head's rate must not be too high for MiniLM.
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "seed": SEED,
    "learning_rate": RATE,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
}


def classifier():
    """MiniLM with a new head; without dropout, whose random numbers the Trainer draws from another state."""
    model = load_classifier(minilm_folder(), labels=2, seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def review_rows(tokenizer, count=24):
    from weightlora.tasks.embedded import rotten_tomatoes

    texts, labels = zip(*rotten_tomatoes(train=count, test=8).train, strict=True)
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=24)
    return [{**{k: v[i] for k, v in encoded.items()}, "labels": label} for i, label in enumerate(labels)]


def trainer_of(folder, model, rows, **arguments):
    return Trainer(model, TrainingArguments(str(folder), **QUIET, **{**ARGUMENTS, **arguments}), train_dataset=rows)


def package(folder, model, rows, task, name, options, arguments):
    trainer = trainer_of(folder, model, rows, **arguments)
    method = weightlora.method_for(trainer, name, lora=LoraConfig(**LORA, task_type=task), steps=T, **options)
    trainer.train(resume_from_checkpoint=True)
    return trainer.model, method


def reference(folder, model, rows, task, name, options, arguments, **other):
    trainer = trainer_of(folder, model, rows, **arguments)
    size, parts = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    steps = [batches[i : i + parts] for i in range(0, len(batches), parts)]
    setting = scratch.Setting(
        r=LORA["r"],
        alpha=LORA["lora_alpha"],
        task_type=task,
        scoring_steps=T,
        seed=SEED,
        plus=name == "weightlora_plus",
        learning_rate=RATE,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        **{"warmup_steps": 1, "max_grad_norm": 0.5, **options, **other},
    )
    sites = [site.name for site in find_sites(model, LoraConfig(**LORA, task_type=task)).sites]
    # Without its cache, which would hold the weights of the first step.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if arguments.get("bf16") else nullcontext():
        return scratch.weightlora(model, sites, steps, setting)


def distance(mine, theirs):
    """Largest difference of the trained weights, which must have the same names."""
    a, b = ({n: p.detach() for n, p in model.named_parameters() if p.requires_grad} for model in (mine, theirs))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


CASES = {
    "llama": ("llama", "weightlora", {}, {}),
    "llama, joint": ("llama", "weightlora", {"order": "joint"}, {}),
    "llama, plus": ("llama", "weightlora_plus", {}, {}),
    "llama, plus, joint": ("llama", "weightlora_plus", {"order": "joint"}, {}),
    "llama, K of 14": ("llama", "weightlora_plus", {"adapters": 5}, {}),
    "llama, one threshold": ("llama", "weightlora", {"threshold_every": T}, {}),
    "llama, accumulation": ("llama", "weightlora", {}, {"gradient_accumulation_steps": 4, "num_train_epochs": 1}),
    "llama, joint, accumulation": ("llama", "weightlora", {"order": "joint"}, {"gradient_accumulation_steps": 4}),
    "llama, bf16": ("llama", "weightlora", {}, {"bf16": True}),
    "minilm": ("minilm", "weightlora", {}, {}),
    "minilm, joint": ("minilm", "weightlora", {"order": "joint"}, {}),
    "minilm, plus": ("minilm", "weightlora_plus", {}, {}),
    "minilm, bf16": ("minilm", "weightlora", {}, {"bf16": True}),
}


#: Half precision is slow on a CPU; of two options, each alone is left.
SLOW = ("llama, plus, joint", "llama, joint, accumulation", "minilm, joint", "minilm, plus", "minilm, bf16")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_the_package_is_the_paper_in_one_file(case, tokenizer, tmp_path):
    kind, name, options, arguments = CASES[case]
    make, task = (tiny_llama, "CAUSAL_LM") if kind == "llama" else (classifier, "SEQ_CLS")
    parts = arguments.get("gradient_accumulation_steps", 1)
    rows = tiny_rows(24 * parts) if kind == "llama" else review_rows(tokenizer)
    asked = (rows, task, name, options, arguments)
    mine, method = package(tmp_path, make(), *asked)
    theirs, ranks, history = reference(tmp_path, make(), *asked)
    exact = 2e-2 if arguments.get("bf16") else 1e-3
    assert torch.tensor(method.plan.history).allclose(torch.tensor(history), atol=exact, rtol=exact)
    assert {site: r for site, r in method.plan.ranks.items() if r} == ranks
    assert distance(mine, theirs) < exact

    # The control: the other order has other gates.
    other = {"order": "joint" if options.get("order") != "joint" else "alternating"}
    _, _, others = reference(tmp_path, make(), *asked, **other)
    assert not torch.tensor(history).allclose(torch.tensor(others), atol=exact, rtol=exact)


class Seen(TrainerCallback):
    """What the trainer's model is called with, and the rate of each step."""

    def __init__(self, model):
        self.tokens, self.rates, self.first = [], [], None
        model.register_forward_pre_hook(lambda _m, _a, k: self.tokens.append(k["input_ids"].tolist()), with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002 - the Trainer decides
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])
        self.first = state.global_step if self.first is None else self.first


def test_the_training_goes_on_with_the_next_batch_at_the_next_rate(tmp_path):
    rows = tiny_rows(24)
    plain = trainer_of(tmp_path / "plain", tiny_llama(), rows)
    all_of = Seen(plain.model)
    plain.add_callback(all_of)
    plain.train()

    trainer = trainer_of(tmp_path / "run", tiny_llama(), rows)
    read = Seen(trainer.model)
    weightlora.method_for(trainer, "weightlora", lora=LoraConfig(**LORA), steps=T, order="joint")
    assert read.tokens[-T:] == all_of.tokens[:T]
    read.tokens.clear()
    trainer.add_callback(read)
    trainer.train(resume_from_checkpoint=True)
    assert (read.tokens, read.rates, read.first) == (all_of.tokens[T:], all_of.rates[T:], T)
    assert trainer.state.global_step == plain.state.global_step == 6


def test_where_no_gate_moves_the_first_steps_are_those_of_the_plain_trainer(tokenizer, tmp_path):
    """With η → 0 and all adapters kept, phase 1 is LoRA's training: the head is the Trainer's after T steps."""
    rows, lora = review_rows(tokenizer), LoraConfig(**LORA, task_type="SEQ_CLS")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            control.should_training_stop = state.global_step >= T

    model = classifier()
    trainer = trainer_of(tmp_path / "run", model, rows)
    weightlora.method_for(trainer, "weightlora", lora=lora, steps=T, adapters=36, gate_lr=1e-30)
    head = [p.detach().clone() for n, p in trainer.model.named_parameters() if ".modules_to_save." in n]

    plain = trainer_of(tmp_path / "plain", classifier(), rows)
    weightlora.method_for(plain, "lora", lora=lora)
    before = [p.detach().clone() for n, p in plain.model.named_parameters() if ".modules_to_save." in n]
    plain.add_callback(Stop())
    plain.train()
    after = [p for n, p in plain.model.named_parameters() if ".modules_to_save." in n]
    for mine, theirs, first in zip(head, after, before, strict=True):
        assert mine.allclose(theirs, atol=1e-6)
        assert not mine.equal(first)


def test_training_again_what_was_trained_is_refused_and_the_second_start_goes_on(tmp_path):
    rows, lora = tiny_rows(24), LoraConfig(**LORA)
    trainer = trainer_of(tmp_path, tiny_llama(), rows)
    first = weightlora.method_for(trainer, "weightlora", lora=lora, steps=T)
    with pytest.raises(OptionError, match=r"took the first 3 steps of this training.*resume_from_checkpoint=True"):
        trainer.train()
    trainer = trainer_of(tmp_path, tiny_llama(), rows)
    second = weightlora.method_for(trainer, "weightlora", lora=lora, steps=T)
    assert second.plan == first.plan
    with pytest.raises(OptionError, match="took the first 3 steps"):
        trainer.train()
    trainer = trainer_of(tmp_path, tiny_llama(), rows)
    weightlora.method_for(trainer, "weightlora", lora=lora, steps=T)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    trainer = trainer_of(tmp_path, tiny_llama(), rows, weight_decay=0.2)
    with pytest.raises(OptionError, match=r"weight_decay=0.1 there, 0.2 now"):
        weightlora.method_for(trainer, "weightlora", lora=lora, steps=T)


@pytest.mark.parametrize(("total", "expected"), [(6, 2), (400, 2), (401, 3), (10_000, 50)])
def test_t_is_half_a_percent_and_at_least_two(total, expected, tmp_path):
    assert expected == max(2, math.ceil(total / 200))  # section 2
    trainer = trainer_of(tmp_path, tiny_llama(), tiny_rows(64), max_steps=total, per_device_train_batch_size=1)
    method = weightlora.method_for(trainer, "weightlora", lora=LoraConfig(r=1, target_modules=["q_proj", "v_proj"]))
    assert method.plan.options["steps"] == method.begun.steps == len(method.plan.history) == expected
    assert (tmp_path / f"checkpoint-{expected}" / "optimizer.pt").exists()
