"""A recipe: the file under the command line, every word checked, and what is written down runs again."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import yaml
from architectures import model_of
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainerState
from trl import SFTConfig

from weightlora.errors import DataError, OptionError
from weightlora.model.layers import adapter_ranks
from weightlora.plan.limits import LIMITS
from weightlora.runs._load import _with_lora
from weightlora.runs._parsers import Parser, training_names
from weightlora.runs.recipe import MethodOptions, ModelOptions, TaskOptions, read_recipe
from weightlora.tasks import TASKS, kind_of


@pytest.fixture
def written(tmp_path):
    """Write a recipe file of these options and return its path."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(written):
    file = written({"task": "rte", "adapters": 18, "learning_rate": 2e-3, "columns": ["text=a"], "bf16": False})
    recipe = read_recipe(file, ["--learning_rate", "5e-4", "--use_rslora"])
    assert (recipe.task.task, recipe.method.adapters, recipe.task.columns) == ("rte", "18", ["text=a"])
    assert (recipe.training.learning_rate, recipe.method.use_rslora) == (5e-4, True)
    assert (recipe.method.lora_r, recipe.training.output_dir) == (8, "runs/train")


def test_limits_can_be_combined_and_a_method_takes_its_own():
    given = read_recipe(words=["--adapters=18", "--parameters=0.1", "--time=0.6", "--memory=8GB"]).method.given
    assert {name: given[name] for name in LIMITS} == {"adapters": 18, "parameters": 0.1, "time": 0.6, "memory": "8GB"}
    assert read_recipe(words=["--method=random", "--parameters=300_000"]).method.given == {"parameters": 300_000}
    assert read_recipe(words=["--method=lora", "--adapters=18"]).method.given == {}  # as with rule and steps
    with pytest.raises(OptionError, match=r"time=0\.6: method random is limited by adapters and parameters"):
        read_recipe(words=["--method=random", "--time=0.6"])


def test_fast_alone_means_the_dropout_of_peft(written):
    assert [read_recipe(words=words).method.fast for words in ([], ["--fast"], ["--fast", "rank"])] == [
        *(None, "input", "rank")
    ]
    assert read_recipe(written({"fast": "input"})).method.fast == "input"
    with pytest.raises(OptionError, match="fast='both' is not allowed: give 'input' or 'rank'"):
        read_recipe(words=["--fast=both"])


@pytest.mark.parametrize(
    ("task", "arguments", "word"),
    [
        ("xsum", Seq2SeqTrainingArguments, "--predict_with_generate"),
        ("gsm8k", SFTConfig, "--completion_only_loss"),
    ],
)
def test_the_task_decides_which_training_arguments_there_are(task, arguments, word):
    words = ["--task", task, word, "true"]
    assert type(read_recipe(words=words).training) is arguments
    with pytest.raises(OptionError, match=f"unknown option '{word}'"):
        read_recipe(words=["--task", "rte", word, "true"])


def test_what_is_written_down_is_the_same_recipe_again(written):
    words = [
        "--task=gsm8k",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--adapters=0.25",
        "--max_steps=7",
        "--bf16=false",
    ]
    words += ["--lr_scheduler_type=cosine", "--optim_args=a=1", "--eval_steps=0.5", "--load_in_4bit", "--use_cpu"]
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 2}']
    recipe = read_recipe(words=words)
    settings = recipe.settings
    assert settings["lr_scheduler_type"] == "cosine"
    assert "weight_decay" not in settings  # the default is not worth a line
    assert read_recipe(written(settings)).settings == settings


@pytest.mark.parametrize("has_it", [False, True])
def test_bf16_is_chosen_by_trl_where_the_device_has_it(has_it, monkeypatch):
    """On a CPU it is none, with the word for it and without; what the user says stays."""
    for place in ("transformers.utils", "transformers.training_args"):
        monkeypatch.setattr(f"{place}.is_torch_bf16_gpu_available", lambda: has_it)
    for words, bf16 in (
        (["--task=chat"], has_it),
        (["--task=chat", "--use_cpu"], False),
        (["--task=chat", "--use_cpu", "--bf16=true"], True),
        (["--task=chat", "--bf16=false"], False),
        (["--task=rte"], False),
        (["--task=rte", "--use_cpu", "--bf16"], True),
    ):
        recipe = read_recipe(words=words)
        assert (recipe.training.bf16, recipe.settings["bf16"]) == (bf16, bf16), words
    if not has_it:
        with pytest.raises(OptionError, match="bf16"):
            read_recipe(words=["--task=chat", "--bf16=true"])


@pytest.mark.parametrize(
    ("content", "words", "text"),
    [
        ({"learning_rat": 1}, [], r"recipe.yaml: unknown option 'learning_rat' \(closest: 'learning_rate'\)"),
        ({"lora_rs": 1}, [], r"unknown option 'lora_rs' \(closest: 'lora_r'\)"),
        ({}, ["--lerning_rate", "1"], r"unknown option '--lerning_rate' \(closest: 'learning_rate'\)"),
        ({}, ["--learning", "1"], r"unknown option '--learning'"),  # an abbreviation may mean another one tomorrow
        ({"task": "rtee"}, [], r"task='rtee' is unknown \(closest: 'rte'\)"),
        ({"method": "adalor"}, [], r"method='adalor' is unknown \(closest: 'adalora'\)"),
        ({}, ["--method=eva", "--method_options", "whitn=true"], r"eva has no option 'whitn' \(closest: 'whiten'\)"),
        ({}, ["--method_options", "stps=3"], r"selected has no option 'stps' \(closest: 'steps'\)"),
        ({"steps": "soon"}, [], r"steps='soon' is not allowed: give a whole number below 10⁹, or 'auto'"),
        ({"steps": 1}, [], r"steps=1 is not allowed: give at least 2"),
        ({"learning_rate": "fast"}, [], r"--learning_rate.*: invalid float value: 'fast'"),
        ({"lr_scheduler_type": "cosin"}, [], r"--lr_scheduler_type.*: invalid choice: 'cosin'"),
        ({"load_in_8bit": "perhaps"}, [], "load_in_8bit='perhaps' is not allowed: give true or false"),
        ({"save_strategy": "steps", "eval_strategy": "epoch", "load_best_model_at_end": True}, [], "load_best_model"),
    ],
)
def test_a_mistake_is_one_line(written, content, words, text):
    with pytest.raises(OptionError, match=text) as caught:
        read_recipe(written(content), words)
    assert re.fullmatch(r"[^\n]+", str(caught.value))


@pytest.mark.parametrize(
    "value", ["2024-01-01", "{a: 2024-01-01}", "{2024-01-01: 1}", "{a: !!binary aGk=}", "&a {b: *a}"]
)
@pytest.mark.parametrize("option", ["learning_rate", "lr_scheduler_kwargs", "adapters"])
def test_a_date_or_what_else_yaml_has_is_one_line_that_names_the_option(written, option, value):
    with pytest.raises(OptionError, match=option) as caught:
        read_recipe(written(f"task: rte\n{option}: {value}\n"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"), [("- 1\n- 2\n", "holds a list"), ("a: [", "cannot read"), (None, "cannot read")]
)
def test_a_file_that_is_no_recipe(written, tmp_path, content, text):
    path = tmp_path / "missing.yaml" if content is None else written(content)
    with pytest.raises(DataError, match=text):
        read_recipe(path)


@pytest.mark.parametrize("task", ["text_classification", "xsum", "gsm8k"])
def test_the_default_rate_suits_adapters_and_is_written_down(task, written):
    """Transformers' is 5e-5 and TRL's 2e-5: LoRA hardly moves."""
    words = ["--task", task, "--bf16", "false"]
    recipe = read_recipe(words=words)
    assert recipe.settings["learning_rate"] == recipe.training.learning_rate == 1e-3
    for rate in (5e-5, 2e-5):  # written down where it is the class's own default, too
        given = read_recipe(words=[*words, f"--learning_rate={rate}"])
        assert read_recipe(written(given.settings)).training.learning_rate == rate
    assert read_recipe(words=[*words, "--method=full"]).training.learning_rate < 1e-4  # no adapters


@pytest.mark.parametrize("task", ["text_classification", "gsm8k"])
@pytest.mark.parametrize("steps", [10, 11, 21, 60, 137])
def test_losses_are_logged_at_least_ten_times(task, steps, written):
    words = ["--task", task, "--bf16", "false"]
    recipe = read_recipe(words=words)
    state = TrainerState()
    state.compute_steps(recipe.training, steps)
    assert steps // state.logging_steps >= 10
    assert read_recipe(written(recipe.settings)).training.logging_steps == recipe.training.logging_steps
    given = read_recipe(words=[*words, "--logging_steps=500"])
    assert read_recipe(written(given.settings)).training.logging_steps == 500


# -- what is read without transformers is what transformers reads ----------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "question_answering", "summarisation", "completion"])
def test_names_read_from_the_source_are_those_of_the_class(kind):
    task = next(task for task in TASKS if task.kind == kind)
    made = kind_of(task).arguments_class()
    assert training_names(kind) == {field.name for field in dataclasses.fields(made) if field.init}


def test_our_parser_reads_what_transformers_reads():
    """Every option of ours in several spellings, and values of all types."""
    parts = (ModelOptions, TaskOptions, MethodOptions)
    for words in (
        [],
        ["--lora-r=4", "--adapters", "3", "--use_rslora", "--load_in_4bit", "yes", "--grow_batch", "0", "--fast"],
        [
            "--columns",
            "text=a",
            "label=b",
            "--max_train_samples=7",
            "--dtype=float16",
            "--fast=rank",
            "x",
            "--seed",
            "3",
        ],
        [
            "--head_learning_rate",
            "1e-3",
            "--ranking=spread",
            "--lora_dropout",
            "0.1",
            "--validation_file=a",
            "--train_file=b",
        ],
    ):
        theirs = HfArgumentParser(parts, allow_abbrev=False, add_help=False)
        *wanted, rest = theirs.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        assert Parser(*parts).read(words) == (wanted, rest)


# -- ``all-linear`` puts the adapters on a mixture of experts that PEFT would put there ------------------------------

ALL = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def test_a_recipe_adapts_what_peft_adapts():
    options = MethodOptions(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules=["all-linear"])
    unquantised = SimpleNamespace(load_in_8bit=False, load_in_4bit=False)
    model = _with_lora(model_of("OLMoE"), SimpleNamespace(method=options, model=unquantised), "CAUSAL_LM")
    plain = adapter_ranks(get_peft_model(model_of("OLMoE"), LoraConfig(**ALL)))
    assert adapter_ranks(model) == plain
    assert sum("experts" in name for name in plain) == 4  # two layers, two parameters each
