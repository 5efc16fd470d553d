"""``weightlora train``: the wrapper changes nothing, a killed run ends as an unbroken one, a mistake is one line."""

import json
import multiprocessing
import random
import re
import shutil
import time

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from weightlora.cli import main
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.model.sites import find_sites
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train
from weightlora.tasks.classification import accuracy, encode
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.tasks.embedded import rotten_tomatoes

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TRAINING = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 2e-3,
    "use_cpu": True,
    "disable_tqdm": True,
}
ROWS = {"task": "rotten_tomatoes", "max_train_samples": 32, "max_eval_samples": 16, "max_seq_length": 16}
SMALL = {
    **ROWS,
    **TRAINING,
    "lora_dropout": 0.1,
    "adapters": 9,
    "steps": 2,
    "rule": "first_order",
    "rule_options": "head_steps=2",
}


def words(folder, **changed):
    options = {**SMALL, **changed, "output_dir": folder}
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


def run(folder, **changed):
    return train(read_recipe(words=words(folder, **changed)[1:]))


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_a_stock_adapter_its_plan_a_card_and_numbers(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    plan = AdapterPlan.load(unbroken / "plan.json")
    assert (results["adapters"], results["sites"], results["steps"]) == (len(plan.names), 36, 6) == (9, 36, 6)
    assert results["adapter_parameters"] == plan.parameters < results["lora_parameters"]
    assert 0 <= results["metrics"]["validation_accuracy"] <= 1
    assert [step for step, _ in results["losses"]] == [1, 2, 3, 4, 5, 6]

    base = AutoModelForSequenceClassification.from_pretrained(str(minilm_folder()), num_labels=2)
    plan.check(PeftModel.from_pretrained(base, str(unbroken / "adapter")))
    for folder in (unbroken / "adapter", *unbroken.glob("checkpoint-*")):
        assert AdapterPlan.load(folder / "plan.json") == plan
        texts = [file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md", ".jinja")]
        assert not any(str(minilm_folder()) in text for text in texts), "a path of this machine"
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == MINILM
    assert plan.base_model == MINILM
    card = (unbroken / "adapter" / "README.md").read_text()
    assert f"base_model: {MINILM}" in card
    assert "9 of 36 sites" in card
    assert len(re.findall(r"^\| [\w.]+ \| \d of 6 \|", card, re.MULTILINE)) == 6  # one line a projection of MiniLM


@pytest.mark.slow
def test_the_configuration_that_was_saved_gives_the_same_run_again(unbroken, tmp_path):
    assert main(["train", "--config", str(unbroken / "config.yaml"), f"--output_dir={tmp_path}"]) == 0
    assert equal(adapter(tmp_path), adapter(unbroken))
    assert (tmp_path / "heatmap.png").stat().st_size > 1000
    pictures = [tmp_path / "heatmap.png", tmp_path / "adapter" / "plan.png", unbroken / "adapter" / "plan.png"]
    assert len({picture.read_bytes() for picture in pictures}) == 1
    saved = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (unbroken, tmp_path)]
    assert {**saved[0], "output_dir": ""} == {**saved[1], "output_dir": ""}


@pytest.mark.slow
def test_a_method_that_prunes_while_it_trains_ends_in_a_stock_adapter_on_its_budget(tmp_path):
    own = "--method_options", "init_r=12", "deltaT=1"
    assert main([*words(tmp_path, method="adalora", save_steps=3, max_eval_samples=4), *own]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    plan = AdapterPlan.load(tmp_path / "adapter" / "plan.json")
    assert sum(plan.ranks.values()) == 36 * 8
    assert results["adapter_parameters"] == plan.parameters
    assert len(set(plan.ranks.values())) > 1
    assert set(AdapterPlan.load(tmp_path / "plan.json").ranks.values()) == {12}
    base = AutoModelForSequenceClassification.from_pretrained(str(minilm_folder()), num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    plan.check(loaded)
    assert sum(p.numel() for n, p in loaded.named_parameters() if ".lora_" in n) == plan.parameters
    with pytest.raises(OptionError, match="method_options='init_r' is not allowed: give name=value"):
        _ = read_recipe(words=["--method_options=init_r"]).method.own


def test_a_finished_run_is_not_run_again_and_other_options_are_refused(unbroken):
    before = (unbroken / "adapter" / "adapter_model.safetensors").stat()
    assert run(unbroken) == json.loads((unbroken / "results.json").read_text())
    assert (unbroken / "adapter" / "adapter_model.safetensors").stat() == before
    with pytest.raises(
        OptionError, match=r"other options \(adapters: '9' there, '10' now\); choose another output_dir"
    ):
        run(unbroken, adapters=10)


def test_a_hub_that_does_not_answer_is_known_before_anything_is_read(tmp_path, monkeypatch, capsys):
    def whoami(_api):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    assert main(words(tmp_path / "out", push_to_hub=True)) == 2
    assert capsys.readouterr().err.startswith(
        "weightlora: error: push_to_hub: the hub knows no such user: no route; log"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_eval_on_start_measures_the_base_model(tmp_path, tokenizer):
    results = run(tmp_path, eval_on_start=True, seed=3, method="random")
    set_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(str(minilm_folder()), num_labels=2)
    expected = evaluated(model, tokenizer, tmp_path / "base")
    assert results["before"]["validation_accuracy"] == expected


@pytest.mark.slow
def test_eval_on_start_measures_the_base_model_before_a_warm_start(tmp_path):
    """Compared by the loss, since few rows change sides; a rate of nearly 0 keeps the weights of the scoring."""
    first = {"eval_on_start": True, "max_steps": 1, "learning_rate": 1e-9}
    cold = run(tmp_path / "cold", method="lora", **first)
    own = "--method_options", "warm_start=true", "learning_rate=0.005"
    warm = train(read_recipe(words=[*words(tmp_path / "warm", rule="paper", **first)[1:], *own]))
    assert warm["before"] == cold["before"]
    assert warm["metrics"]["validation_loss"] != pytest.approx(cold["metrics"]["validation_loss"], rel=1e-3)  # control


# -- the wrapper changes nothing -------------------------------------------------------------------------------------


def trainer_of(model, tokenizer, folder, **options):
    rows = rotten_tomatoes(train=32, test=16)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**TRAINING, **options}),
        train_dataset=encode(tokenizer, rows.train, max_length=16),
        eval_dataset=encode(tokenizer, rows.test, max_length=16),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


def evaluated(model, tokenizer, folder):
    return trainer_of(model, tokenizer, folder).evaluate()["eval_accuracy"]


def hand_written(folder, seed):
    """What a user of transformers and PEFT writes, without us: losses, accuracy and adapter."""
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(minilm_folder()), num_labels=2)
    set_seed(seed)
    linear = r".*\.encoder\..*\.(query|key|value|dense)"
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=linear, task_type="SEQ_CLS")
    model = get_peft_model(model, lora)
    trainer = trainer_of(model, tokenizer, folder, seed=seed)
    trainer.train()
    model.save_pretrained(str(folder / "adapter"))
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_accuracy"]


@pytest.mark.slow
def test_method_lora_is_the_script_without_us_loss_curve_included(tmp_path):
    results = run(tmp_path / "ours", method="lora", seed=1)
    losses, measured = hand_written(tmp_path / "script", seed=1)
    assert results["losses"] == losses
    assert results["metrics"]["validation_accuracy"] == measured
    assert equal(adapter(tmp_path / "ours"), adapter(tmp_path / "script"))

    other, _ = hand_written(tmp_path / "other", seed=2)  # the control: the comparison can fail
    assert other != losses


def test_a_plan_decides_where_one_is_given(unbroken, tmp_path):
    results = run(tmp_path, plan=unbroken / "plan.json")
    assert results["method"] == "plan"
    assert equal(adapter(tmp_path), adapter(unbroken))  # the scoring leaves no trace in the training


# -- the fast step ---------------------------------------------------------------------------------------------------


def losses(results):
    return torch.tensor([loss for _, loss in results["losses"]])


@pytest.mark.slow
def test_the_fast_step_gives_the_losses_of_pefts(tmp_path):
    stock = run(tmp_path / "stock", lora_dropout=0)
    fast = run(tmp_path / "fast", lora_dropout=0, fast="input")
    plans = [AdapterPlan.load(tmp_path / folder / "plan.json") for folder in ("stock", "fast")]
    assert plans[1].options["fast"] == "input"
    assert plans[0].ranks == plans[1].ranks
    torch.testing.assert_close(losses(fast), losses(stock), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(plans[1].history), torch.tensor(plans[0].history), rtol=1e-4, atol=0)
    assert fast["metrics"] == stock["metrics"]
    saved = [(tmp_path / folder / "adapter" / "adapter_config.json").read_text() for folder in ("stock", "fast")]
    assert saved[0] == saved[1]
    assert plans[0].history != plans[1].history  # it was the fast step that ran: it rounds in another order


@pytest.mark.slow
def test_the_fast_step_goes_on_where_it_stopped(unbroken, tmp_path):
    whole = run(tmp_path, fast="rank")
    # The control of the test above: with dropout behind A the losses are others.
    assert not torch.allclose(losses(whole), torch.tensor([loss for _, loss in curve(unbroken)]), rtol=1e-5, atol=0)
    before = adapter(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "results.json").unlink()
    assert losses(run(tmp_path, fast="rank")).equal(losses(whole))
    assert equal(adapter(tmp_path), before)
    (tmp_path / "results.json").unlink()
    with pytest.raises(OptionError, match="fast: 'rank' there, 'input' now"):
        run(tmp_path, fast="input")


def test_what_the_fast_step_leaves_to_peft_is_told(tmp_path):
    with pytest.warns(WeightLoraWarning, match="does not cover 9 of 9 LoRA layers"):
        run(tmp_path, fast="input", use_dora=True, method="random", max_steps=1)


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch():
    """Start the command in a process of its own; the server has the libraries loaded, so that a start is quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["weightlora.runs.train", "weightlora.cli.train"])

    def start(folder):
        process = context.Process(target=main, args=(words(folder),))
        process.start()
        return process

    return start


def finish(launch, folder):
    process = launch(folder)
    process.join()
    assert process.exitcode == 0


def phase(folder):
    """Where a killed run stood, by what it left."""
    checkpoints = list(folder.glob("checkpoint-*"))
    if (folder / "results.json").exists():
        return "finished"
    if not (folder / "plan.json").exists():
        return "scoring" if (folder / "config.yaml").exists() else "start"
    if not checkpoints:
        return "between"
    return "training" if all((c / "plan.json").exists() for c in checkpoints) else "checkpoint"


#: What appears in the folder, and the seconds after it: the four named moments, then six by lot.
MOMENTS = [("config.yaml", 0.05), ("plan.json", 0.0), ("checkpoint-2", 0.0), ("checkpoint-4/plan.json", 0.0)]
MOMENTS += [("config.yaml", random.Random(i).uniform(0.0, 2.5)) for i in range(6)]


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_takes_no_step_more(tmp_path):
    options = {"lr_scheduler_type": "constant", "save_total_limit": 1, "seed": 5}  # a step more would be seen
    whole = run(tmp_path, **options)
    before = adapter(tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "results.json").unlink()
    again = run(tmp_path, **options)
    seconds = {"selection_seconds": 0, "training_seconds": 0}
    assert {**again, **seconds} == {**whole, **seconds}
    assert equal(adapter(tmp_path), before)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0]}+{m[1]:.2f}s")
def test_a_killed_run_goes_on_to_the_same_adapter_bit_for_bit(unbroken, launch, tmp_path, moment, record_property):
    awaited, delay = moment
    process = launch(tmp_path)
    while process.is_alive() and not (tmp_path / awaited).exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    record_property("phase", phase(tmp_path))
    finish(launch, tmp_path)
    assert equal(adapter(tmp_path), adapter(unbroken))
    assert AdapterPlan.load(tmp_path / "plan.json") == AdapterPlan.load(unbroken / "plan.json")
    assert json.loads((tmp_path / "results.json").read_text())["losses"] == curve(unbroken)


def curve(folder):
    return json.loads((folder / "results.json").read_text())["losses"]


#: In the order in which a checkpoint is written; a kill leaves the first few.
WRITTEN = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("last", WRITTEN)
def test_a_checkpoint_that_was_being_written_is_not_gone_on_from(unbroken, tmp_path, last):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    for gone in ("results.json", "adapter/README.md", "checkpoint-6/plan.json"):
        (folder / gone).unlink()
    for name in WRITTEN[WRITTEN.index(last) :]:
        (folder / "checkpoint-6" / name).unlink()
    run(folder)
    assert equal(adapter(folder), adapter(unbroken))
    assert curve(folder) == curve(unbroken)


# -- mistakes ----------------------------------------------------------------------------------------------------------

GOOD = [{"text": f"a film {i}", "label": "ab"[i % 2]} for i in range(8)]


def rows_file(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"columns": "label=stars"}, r"no column 'stars' .*; it has 'text', 'label'"),
        ({"validation_rows": []}, r"validation.jsonl has no rows"),
        ({"validation_rows": [{"text": "a", "label": None}]}, r"line 1 of .*validation.jsonl has the label None"),
        ({"task": "text_classificaton"}, r"unknown \(closest: 'text_classification'\)"),
        ({"lerning_rate": 1}, r"unknown option '--lerning_rate=1' \(closest: 'learning_rate'\)"),
        ({"model_name_or_path": "no/such/folder/here"}, r"cannot load .* from no/such/folder/here"),
        ({"method": "weightlora_pluss"}, r"method='weightlora_pluss' is unknown \(closest: 'weightlora_plus'\)"),
        ({"adapters": 37}, r"adapters=37"),
        ({"plan": "missing.json"}, r"missing.json"),
        ({"train_file": "missing.csv"}, r"there is no file missing.csv"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line_exit_2_and_leaves_nothing(tmp_path, capsys, changed, text):
    changed = dict(changed)
    validation = rows_file(tmp_path, "validation.jsonl", changed.pop("validation_rows", GOOD))
    own = {"task": "text_classification", "train_file": rows_file(tmp_path, "train.jsonl", GOOD)}
    out = tmp_path / "out"
    assert failure(capsys, words(out, **{**own, "validation_file": validation, **changed}), text)
    left = [path for path in out.rglob("*") if path.is_file() and path.name not in ("config.yaml", ".weightlora.json")]
    assert not left


def failure(capsys, command, text):
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match("weightlora: error: ", last)
    assert re.search(text, last), last
    return last


def test_a_plan_for_another_model_lists_what_does_not_match(tmp_path, capsys):
    sites = find_sites(torch.nn.ModuleDict({"other": torch.nn.Linear(2, 2)}), LoraConfig(r=8, lora_alpha=16)).sites
    make_plan(sites, LoraConfig(r=8, lora_alpha=16), ["other"]).save(tmp_path / "plan.json")
    assert "other" in failure(
        capsys, words(tmp_path / "out", plan=tmp_path / "plan.json", lora_dropout=0), "another model|missing"
    )


def test_a_checkpoint_without_its_plan_is_named(unbroken, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(unbroken / "checkpoint-4", checkpoint)
    (checkpoint / "plan.json").unlink()
    out = tmp_path / "out"
    failure(capsys, words(out, resume_from_checkpoint=checkpoint), r"checkpoint-4 is no whole checkpoint.*plan.json")


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    failure(capsys, words(tmp_path / "file" / "out"), "cannot write|choose another")
