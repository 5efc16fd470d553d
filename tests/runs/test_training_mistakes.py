"""Training arguments that fail only in the training are one line, before the scoring; nothing is left behind."""

import re

import pytest
from small_run import words, write_base

from weightlora.cli import main
from weightlora.selection.stage import Stage

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


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return write_base(tmp_path_factory.mktemp("base"), tokenizer)


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
