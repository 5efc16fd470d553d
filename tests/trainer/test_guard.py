"""A trainer and its plan stay together; the plan's screen is printed once, and trackers get the plan once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import tiny_llama
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import weightlora
from weightlora.errors import OptionError, OutputError, SelectionError
from weightlora.model.layers import lora_layers
from weightlora.plan.plan import AdapterPlan
from weightlora.trainer.guard import plan_numbers

# -- nothing is lost, another adapter is not trained, a mistake can be corrected -------------------------------------

ASKED = {"adapters": 2, "rule": "first_order", "steps": 2}
OTHER = LoraConfig(r=2, target_modules=["k_proj"])


def test_a_second_adapter_is_not_deleted(make_tiny):
    trainer = make_tiny()
    trainer.model.add_adapter("other", OTHER)
    with pytest.raises(OptionError, match=r"has adapters default, other.*model.delete_adapter") as caught:
        weightlora.select_for(trainer, **ASKED)
    assert "\n" not in str(caught.value)
    assert set(trainer.model.peft_config) == {"default", "other"}
    assert lora_layers(trainer.model, "other")
    trainer.model.delete_adapter("other")  # as the text says
    assert len(weightlora.select_for(trainer, **ASKED).names) == 2


def test_a_second_adapter_named_as_trls_reference_is_not_deleted_either(make_tiny):
    trainer = make_tiny()
    trainer.model.add_adapter("ref", OTHER)
    with pytest.raises(OptionError, match="has adapters default, ref"):
        weightlora.select_for(trainer, **ASKED)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ({"adapters": 1.5}, OptionError),
        ({"adaptors": 2}, OptionError),
        ({"rule": "non"}, OptionError),
        ({}, SelectionError),
    ],
)
def test_after_a_mistake_the_same_trainer_is_selected_on(make_tiny, mistake, error):
    """Until then it refuses to train plain LoRA."""
    trainer, expected = make_tiny(), weightlora.select_for(make_tiny("elsewhere"), **ASKED)
    if error is SelectionError:
        mistake = {"loss_fn": lambda model, step: model(**step[0][0]).loss * float("nan")}
    with pytest.raises(error):
        weightlora.select_for(trainer, **{**ASKED, **mistake})
    with pytest.raises(SelectionError, match="would train plain LoRA"):
        trainer.train()
    plan = weightlora.select_for(trainer, **ASKED)
    assert plan == expected
    trainer.train()
    plan.check(trainer.model)


def test_a_failure_that_changed_the_adapters_is_no_start_for_another_selection(make_tiny, monkeypatch):
    """The planned sites would be all candidates of the second one."""

    def full(*_):
        raise OutputError("the disk is full")

    trainer = make_tiny()
    monkeypatch.setattr("weightlora.trainer.attach.keep_plan", full)
    with pytest.raises(OutputError):
        weightlora.select_for(trainer, **ASKED)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="make a new trainer"):
        weightlora.select_for(trainer, **ASKED)


@pytest.mark.parametrize("switch", ["one", "both"])
def test_another_active_adapter_is_not_trained_under_the_plan(make_tiny, switch):
    trainer = make_tiny()
    weightlora.select_for(trainer, **ASKED)
    trainer.model.add_adapter("other", OTHER)
    if switch == "one":
        trainer.model.set_adapter("other")
    else:
        trainer.model.base_model.set_adapter(["default", "other"])
    with pytest.raises(OptionError, match=r"active adapter is .*other.*model.set_adapter\('default'\)") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    trainer.model.set_adapter("default")  # as the text says
    trainer.train()
    trained = {n.split(".")[-2] for n, p in trainer.model.named_parameters() if "lora_B" in n and p.any()}
    assert trained == {"default"}


def test_a_model_that_train_makes_anew_is_refused_before_anything_is_scored(tmp_path):
    drawn = []

    class Rows(list):
        def __getitem__(self, i):
            drawn.append(i)
            return {"input_ids": torch.ones(4).long(), "labels": torch.ones(4).long()}

    trainer = Trainer(
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        model_init=tiny_llama,
        train_dataset=Rows([0] * 400),
    )
    with pytest.raises(OptionError, match=r"model_init.*give model=") as caught:
        weightlora.select_for(trainer, lora=LoraConfig(r=2, target_modules=["q_proj"]), adapters=1)
    assert "\n" not in str(caught.value)
    assert drawn == []


# -- ``select_for`` prints the plan's screen once, unless it is told not to ------------------------------------------

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 400


class Unread:
    """Rows that must not be read."""

    def __len__(self):
        return 400

    def __getitem__(self, place):
        raise AssertionError("a row was read")


@pytest.fixture
def make_trainer(tmp_path):
    def make(rows=ROWS, **arguments):
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        )
        quiet = {"report_to": "none", "use_cpu": True, "max_steps": 100, "per_device_train_batch_size": 2}
        arguments = TrainingArguments(str(tmp_path / str(len([*tmp_path.iterdir()]))), **quiet, **arguments)
        return Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows)

    return make


LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


def test_the_screen_is_printed_once_and_says_what_scoring_took(make_trainer, capsys):
    plan = weightlora.select_for(make_trainer(disable_tqdm=False), lora=LORA, adapters=2)
    printed = capsys.readouterr().out
    assert printed.count(str(plan)) == 1
    assert plan.spent == {"scoring_steps": 3, "total_steps": 100}  # 3 % of them
    assert "scoring   3 steps (3.0 % of 100)" in printed


@pytest.mark.parametrize(("quiet", "disable_tqdm"), [({"progress": False}, False), ({}, True)])
def test_it_is_silent_where_asked(make_trainer, capsys, quiet, disable_tqdm):
    weightlora.select_for(make_trainer(disable_tqdm=disable_tqdm), lora=LORA, parameters=0.5, **quiet)
    assert "asked" not in capsys.readouterr().out


def test_with_parameters_alone_nothing_is_scored_and_nothing_spent(make_trainer, capsys):
    trainer = make_trainer(rows=Unread(), disable_tqdm=False)
    plan = weightlora.select_for(trainer, lora=LORA, parameters=0.5)
    assert plan.spent == {}
    assert "none: nothing is scored" in capsys.readouterr().out
    assert {layer.r["default"] for name, layer in trainer.model.named_modules() if name.endswith("q_proj")} == {4}


# -- trackers, through the trainer's own ``report_to`` ---------------------------------------------------------------


def train(folder, report_to, steps=4, resume=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
        base = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
    rows = [{"input_ids": [i, i + 1, i + 2], "labels": i % 2} for i in range(16)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    trainer = Trainer(model, arguments, train_dataset=rows)
    plan = weightlora.select_for(trainer, adapters=2, steps=2)
    trainer.train(resume_from_checkpoint=resume)
    return plan, trainer


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        found.append(events)
    return found


@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
def test_tensorboard_shows_numbers_and_sites_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    plan, _ = train(tmp_path / "run", "tensorboard")
    (events,) = tensorboard(tmp_path / "logs")
    for name, value in plan_numbers(plan).items():
        (event,) = events.Scalars(f"train/{name}")
        assert (event.step, event.value) == (0, pytest.approx(value))
    (text,) = events.Tensors("plan/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[0].removeprefix("| ") for line in shown.splitlines()[2:]] == [
        entry.site.name for entry in plan.entries
    ]
    # A resumed run goes on with its curves; the plan is known.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "again"))
    train(tmp_path / "run", "tensorboard", steps=6, resume=True)
    (again,) = tensorboard(tmp_path / "again")
    assert not [tag for tag in again.Tags()["scalars"] if "plan" in tag]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
def test_wandb_keeps_the_plan_as_an_artefact(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    plan, _ = train(tmp_path / "run", "wandb")
    wandb.finish()
    kept = [file for file in tmp_path.rglob("*") if is_plan(file, tmp_path / "run")]
    assert kept
    assert AdapterPlan.load(kept[0]).ranks == plan.ranks


def is_plan(file, run):
    """A copy of the plan that W&B made outside of the run's folder."""
    return file.is_file() and run not in file.parents and file.read_bytes() == (run / "plan.json").read_bytes()


@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
def test_without_trackers_nothing_is_logged(tmp_path):
    _, trainer = train(tmp_path / "run", "none")
    assert not [entry for entry in trainer.state.log_history if any("plan" in key for key in entry)]
