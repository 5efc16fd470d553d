"""Training options: a mistake is one line before the scoring; the head's own rate; a loss that has not fallen."""

import json
import math
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_run import words
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, TrainerCallback

from weightlora.cli import main
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import fit, plan, prepare, train
from weightlora.selection.stage import Stage
from weightlora.tasks.embedded import minilm

# -- what fails only in the training is one line, before the scoring; nothing is left behind -------------------------

MEASURED = {"eval_strategy": "steps", "eval_steps": 2}
#: Options, and what the line says.
MISTAKES = [
    ({**MEASURED, "metric_for_best_model": "acuracy"}, r"metric_for_best_model='acuracy'.*closest: 'accuracy'"),
    ({**MEASURED, "metric_for_best_model": "x", "load_best_model_at_end": True}, "give one of loss, accuracy"),
    ({**MEASURED, "metric_for_best_model": "f1", "save_strategy": "best"}, "metric_for_best_model='f1'"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end"),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "load_best_model_at_end"),
    ({**MEASURED, "validation_file": None}, "validation_file"),
    ({"lr_scheduler_type": "linaer"}, "lr_scheduler_type.*'linaer'"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr cannot be used: .*min_lr"),
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_scheduler_type=polynomial.*lr_end"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type=warmup_stable_decay.*num_decay_steps"),
    ({"lr_scheduler_kwargs": '{"x": 1}'}, "lr_scheduler_kwargs={'x': 1}"),
    ({"optim": "adamx"}, "optim.*'adamx'"),
    ({"optim": "galore_adamw"}, "optim=galore_adamw: .*[Ii]nstall"),
    ({"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw: .*install"),
    ({"optim": "grokadamw"}, "optim=grokadamw cannot be used: .*install"),
    ({"optim": "sgd", "optim_args": "momentum=x"}, "optim=sgd, optim_args=momentum=x"),
    ({"max_steps": 0}, "max_steps=0"),
    ({"report_to": "clearml"}, "report_to=clearml: its package is not installed"),
    ({"report_to": "wandbb"}, r"report_to='wandbb' is unknown \(closest: 'wandb'\)"),
    ({"warmup_steps": 7}, "warmup_steps=7.* is more than the 6 steps"),
    ({"group_by_length": True}, "unknown option '--group_by_length"),
    # Sixteen rows in batches of two.
    ({"gradient_accumulation_steps": 9}, "gradient_accumulation_steps=9 is more than the 8 batches"),
    ({"per_device_train_batch_size": 17, "dataloader_drop_last": True}, "per_device_train_batch_size=17"),
    ({"dataloader_persistent_workers": True}, "dataloader_num_workers"),
    ({"fsdp": "full_shard"}, "fsdp.*this is one"),
    ({"deepspeed": "none.json"}, "deepspeed"),
    ({"fp16": True}, "fp16=True needs an accelerator"),
    ({"label_names": "x"}, "label_names is decided by the task"),
    ({"eval_do_concat_batches": False}, "eval_do_concat_batches is decided"),
    ({"prediction_loss_only": True}, "prediction_loss_only is decided"),
    ({"torch_compile_mode": "fast"}, "torch_compile_mode='fast'"),
    ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint='nowhere'"),
]
#: The last values that are taken.
GOOD = [
    {**MEASURED, "metric_for_best_model": "accuracy", "load_best_model_at_end": True},
    {**MEASURED, "load_best_model_at_end": True},
    {"warmup_steps": 6, "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine"},
    {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 16, "dataloader_drop_last": True},
]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("options", "says"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_a_mistake_is_one_line_before_the_scoring(options, says, base, tmp_path, capsys, monkeypatch):
    def paid(*_):
        raise AssertionError("the scoring began")

    monkeypatch.setattr(Stage, "backward", paid)
    assert main(words(base, tmp_path / "run", **options)) == 2
    [line] = re.findall(r"weightlora: error: [^\n]+\n", capsys.readouterr().err)
    assert re.search(says, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("options", GOOD, ids=" ".join)
@pytest.mark.filterwarnings("ignore:.* batches for .* scoring steps")
def test_what_can_be_trained_is_trained(options, base, tmp_path):
    assert main(words(base, tmp_path / "run", **options)) == 0


# -- ``head_learning_rate``: the head moves at its own rate, the adapters at theirs, also after a kill ---------------

SHORT = {
    "task": "rotten_tomatoes",
    "max_train_samples": 16,
    "max_eval_samples": 4,
    "max_seq_length": 16,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def recipe(folder, **changed):
    options = {"method": "lora", **SHORT, **changed, "output_dir": folder}
    return read_recipe(words=[f"--{name}={value}" for name, value in options.items()])


def trained(folder, **changed):
    train(recipe(folder, **changed))
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def is_head(name):
    return ".lora_" not in name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["lora", "adalora", "increlora", "flexlora", "vera", "tied_lora"])
def test_the_head_has_a_group_of_its_own_beside_any_adapters(method, small_model, tmp_path):
    own = {"model_name_or_path": small_model, **({"method_options": "deltaT=1"} if method == "adalora" else {})}
    run = prepare(recipe(tmp_path, method=method, head_learning_rate=0.5, **own))
    fit(run, plan(run))
    head = {
        id(p) for name, p in run.trainer.model.named_parameters() if p.requires_grad and ".modules_to_save." in name
    }
    groups = run.trainer.optimizer.param_groups
    assert head
    for group in groups:
        ids = {id(p) for p in group["params"]}
        assert not ids or ids <= head or not ids & head
        assert group["initial_lr"] == (0.5 if ids and ids <= head else 1e-3)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in run.trainer.model.parameters())


def test_one_step_of_adam_moves_head_and_adapters_by_their_own_rates(tmp_path):
    # Adam's first step is learning_rate · g / (|g| + ε): learning_rate where the gradient is far above ε = 1e-8.
    one = {"max_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0, "max_grad_norm": 0}
    start = trained(tmp_path / "start", **one, learning_rate=0, head_learning_rate=0)
    moved = trained(tmp_path / "moved", **one, head_learning_rate=0.02)
    for name, weight in moved.items():
        rate = 0.02 if is_head(name) else 1e-3
        steps = (weight - start[name]).abs()
        assert steps.max() <= rate * (1 + 1e-4), name
        if ".lora_A" not in name:  # B is zero, so that A has no gradient yet
            assert steps.median() == pytest.approx(rate, rel=1e-3), name


@pytest.mark.slow
def test_the_same_rate_is_the_same_training_and_another_is_another(tmp_path):
    plain, same, other = (
        trained(tmp_path / name, **changed)
        for name, changed in {
            "plain": {},
            "same": {"head_learning_rate": 1e-3},
            "other": {"head_learning_rate": 2e-3},
        }.items()
    )
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not any(torch.equal(plain[name], other[name]) for name in plain if is_head(name))


@pytest.mark.slow
def test_the_scoring_has_it_too(tmp_path):
    run = prepare(
        recipe(
            tmp_path,
            method="selected",
            head_learning_rate=0.02,
            steps=2,
            rule="first_order",
            rule_options="head_steps=2",
        )
    )
    assert plan(run).plan.options["head_learning_rate"] == 0.02


@pytest.mark.slow
def test_a_run_that_resumes_ends_as_an_unbroken_one(tmp_path):
    unbroken = trained(tmp_path / "unbroken", head_learning_rate=0.02)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "broken" / name)
    (tmp_path / "broken" / "results.json").unlink()
    resumed = trained(tmp_path / "broken", head_learning_rate=0.02)
    assert json.loads((tmp_path / "broken" / "results.json").read_text())["steps"] == 4
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_without_a_head_it_is_refused_before_anything_is_written(tmp_path, capsys):
    words = ["--model_name_or_path=embedded/smollm2", "--task=reasoning", "--max_train_samples=4", "--max_steps=1"]
    words += [
        "--dataset_name=reasoning_gym/chain_sum",
        "--use_cpu=true",
        "--bf16=false",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert main(["train", *words, "--head_learning_rate=1e-2"]) == 2
    said = capsys.readouterr().err
    assert "head_learning_rate=0.01: reasoning has no new head" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="head_learning_rate is for adapters beside a head, and full trains all"):
        prepare(recipe(tmp_path, method="full", head_learning_rate=0.01))
    with pytest.raises(OptionError, match=r"head_learning_rate=-1\.0 is not allowed"):
        recipe(tmp_path, head_learning_rate=-1)


# -- a training whose loss has not fallen says so at its end ---------------------------------------------------------

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
