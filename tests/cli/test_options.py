"""Options and recipes, changed at random: a run is made, or one line says what is wrong; texts of users stay plain."""

import dataclasses
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz import assert_plain, cases, generator, plan_with, tell, texts
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, TrainingArguments

from weightlora.bench.table import Cell, Table, to_terminal
from weightlora.cli import main
from weightlora.cli._screen import PlainConsole
from weightlora.cli._streams import one_line_warnings
from weightlora.errors import OptionError, SiteError
from weightlora.methods import METHODS, make_method, options_of
from weightlora.model.sites import find_sites
from weightlora.plan.limits import Limits
from weightlora.runs.recipe import MethodOptions, ModelOptions, TaskOptions, read_recipe
from weightlora.selection.rules import RULES, rule_of, settings_of
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.text import gigabytes, natural, rounded

CASES = cases(80, 1_000)
WORDS = ["0", "-1", "1", "2", "1.5", "nan", "inf", "1e400", "x", "", "true", "[1", "[]", "{a: 1}", "null", "2020-01-01"]
WORDS += ["9" * 30, "9" * 5000, "(", "0.5", "1e-3", "a=b", "=", "x=[1", "*", " ", "all-linear", "auto", "2020-99-99"]
VALUES = [None, True, 0, -1, 1.5, float("nan"), [], [1], ["a", None], {}, {"a": 1}, {1: 2}, "x", "", 10**30, [[1]]]
OURS = [field.name for part in (ModelOptions, TaskOptions, MethodOptions) for field in dataclasses.fields(part)]
#: Those that reach for the network, other machines or a device are left out.
FAR = re.compile(r"output_dir|use_cpu|report_to|deepspeed|fsdp|hub|revision|trust|_name|load_in|compile|tpu|ddp")
THEIRS = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A recipe that runs in a tenth of a second."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    rows = folder / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"a {word} film,{word}\n" for word in ("good", "bad")) * 8)
    recipe = {"task": "text_classification", "train_file": str(rows), "model_name_or_path": str(folder)}
    recipe |= {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4, "max_seq_length": 16}
    return {**recipe, "max_steps": 4, "steps": 2, "method": "random", "disable_tqdm": True}


def changed_options(rng, kind):
    """One or two options with values that a user may write, most of them wrong."""
    if kind == "method":
        name = rng.choice(METHODS).name
        own = sorted(options_of(name)) or ["x"]
        return {"method": name, "method_options": [f"{rng.choice(own)}={rng.choice(WORDS)}"]}
    if kind == "rule":
        name = rng.choice(RULES).name
        settings = list(settings_of(rule_of(name))) or ["x"]
        return {"method": "selected", "rule": name, "rule_options": [f"{rng.choice(settings)}={rng.choice(WORDS)}"]}
    names = {"ours": OURS, "theirs": THEIRS}.get(kind, [*OURS, *THEIRS])
    names = [name for name in names if not FAR.search(name)]
    return {name: rng.choice(VALUES if kind == "file" else WORDS) for name in rng.sample(names, rng.randint(1, 2))}


def command(options, folder, *, as_file):
    """The words of ``weightlora select`` with these options."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    if as_file:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**options, "output_dir": str(out)}))
        return ["select", "--config", str(path)]
    words = [[f"--{k}", *v] if isinstance(v, list) else [f"--{k}={v}"] for k, v in options.items()]
    return ["select", f"--output_dir={out}", *(word for some in words for word in some)]


@pytest.mark.slow
@pytest.mark.fuzz
def test_options_at_random_make_a_plan_or_one_line(base, tmp_path, capsys):
    rng = generator()
    outcomes = Counter()
    for number in range(CASES):
        kind = ("ours", "theirs", "method", "rule", "file")[number % 5]
        changed = changed_options(rng, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(command({**base, **changed}, tmp_path, as_file=kind == "file"))
        said = capsys.readouterr().err
        assert code in (0, 2), changed
        if code == 2:
            line = said[said.rfind("weightlora: error") :]  # after the libraries' warnings
            assert re.fullmatch(r"weightlora: error: [^\n]+\n", line), (changed, said)
        assert (tmp_path / "run" / "plan.json").exists() == (code == 0), changed
        outcomes[kind, code] += 1
    assert {kind for kind, code in outcomes if code == 2} == {"ours", "theirs", "method", "rule", "file"}
    texts = (f"{kind} exit {code}: {count}" for (kind, code), count in sorted(outcomes.items()))
    tell(capsys, f"{CASES} option sets: {', '.join(texts)}; 0 raw tracebacks")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("lora_r", ["0", "-1", "100000", "1.5", "x"]),
        ("lora_alpha", ["0", "-16"]),
        ("lora_dropout", ["1.5", "-0.1", "1", "nan"]),
        ("per_device_train_batch_size", ["0", "-4"]),
        ("gradient_accumulation_steps", ["0"]),
        ("seed", ["-1", "4294967296"]),
        ("data_seed", ["-1"]),
        ("max_eval_samples", ["0", "-1"]),
        ("max_train_samples", ["0"]),
        ("held_out_samples", ["-1"]),
        ("max_steps", ["0", "-2"]),
        ("learning_rate", ["nan", "-1", "inf"]),
        ("num_train_epochs", ["0", "inf"]),
        ("weight_decay", ["-0.1", "nan"]),
        ("adam_beta1", ["1", "-0.1"]),
        ("optim_args", ["x"]),
        ("lr_scheduler_kwargs", ["x"]),
        ("accelerator_config", ["no.json"]),
        ("steps", ["9" * 30, "true"]),
        ("train_file", ["", " "]),
        ("dataset_name", ["other"]),
        ("lora_modules_to_save", ["clasifier"]),
        ("lora_target_modules", ["("]),
    ],
)
def test_a_value_out_of_its_range_is_named(base, tmp_path, capsys, option, values):
    for value in values:
        assert main(command({**base, option: value}, tmp_path, as_file=False)) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"weightlora: error: [^\n]+\n", said), said
        assert option in said or value in said, said
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "name", "option", "values"),
    [
        ("method", "selected", "x", ["[1", "2020-99-99", "9" * 5000]),
        ("method", "selected", "learning_rate", ["0", "-1", "nan", "x", "true", "[1]"]),
        ("method", "selected", "seed", ["-1", "true", "1.5"]),
        ("method", "weightlora_plus", "budget", ["half"]),
        ("method", "adalora", "init_r", ["0", "1.5"]),
        ("method", "adalora", "beta1", ["1", "-1"]),
        ("method", "flexlora", "ranks", ["auto", "0.5", "[1, x]"]),
        ("method", "random", "adapters", ["0", "-1", "half", "[1]"]),
        ("method", "selected", "fast", ["input"]),
        ("rule", "paper", "gate_lr", ["0", "-1", "x", "nan", "null", ""]),
        ("rule", "first_order", "head_steps", ["9" * 30, "-1", "1.5", "true"]),
        ("rule", "integrated_ranks", "most_ranks", ["true", "0", "odd"]),
    ],
)
def test_a_setting_out_of_its_range_is_named(kind, name, option, values):
    for value in values:
        words = [f"--{kind}={name}", f"--{kind}_options", f"{option}={value}"]
        with pytest.raises(OptionError, match=option) as caught:
            read_recipe(words=words)
        assert "\n" not in str(caught.value)
    assert read_recipe(words=["--rule=paper", "--rule_options", "gate_lr=5e-1"]).method.scored_by.gate_lr == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 2020-99-99\n", "cannot read"),
        ("doc_stride: [1]\n", "doc_stride"),
        ("columns: [[text]]\n", "columns"),
        ("lora_r: {a: 1}\n", "lora_r"),
        ("a: " + "[" * 5000, "cannot read"),
    ],
)
def test_a_recipe_that_yaml_reads_as_something_else_is_one_line(tmp_path, capsys, text, says):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["select", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert re.fullmatch(rf"weightlora: error: [^\n]*{says}[^\n]*\n", capsys.readouterr().err)


def test_numbers_of_numpy_are_numbers():
    assert Limits(adapters=np.int64(2)).k_of(5) == Limits(adapters=2).k_of(5) == 2
    assert Limits(parameters=np.float32(0.5)).parameters_of(60) == Limits(parameters=0.5).parameters_of(60) == 30
    assert make_method("eva", steps=np.int64(3)) is not None
    for wrong in (np.int64(0), np.bool_(True), [1], "2"):
        with pytest.raises(OptionError, match="adapters="):
            Limits(adapters=wrong)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_broken_regular_expression_is_named(option):
    lora = LoraConfig(target_modules=["0"])
    setattr(lora, option, {"(0": 4} if option.endswith("pattern") else "(0")
    with pytest.raises(SiteError, match=rf"{option}.*'\(0'.*regular expression"):
        find_sites(nn.Sequential(nn.Linear(4, 4)), lora)


def test_a_batch_of_20_digits_and_a_picture_of_no_format_are_one_line(capsys):
    for words, says in {
        ("estimate", "plan.json", "--batch", f"{'9' * 20}x128"): "--batch",
        ("estimate", "plan.json", "--batch", f"4x{'9' * 20}"): "--batch",
        ("show", "plan.json", "--png", "x.exe"): "--png x.exe is not allowed: give a name that ends with .png",
        ("show", "plan.json", "--knee", "x"): "--knee x is not allowed",
    }.items():
        assert main(list(words)) == 2
        assert says in capsys.readouterr().err


# -- texts of users: markup, escape sequences, line breaks, half characters ------------------------------------------


@pytest.mark.parametrize("text", texts(0, 30), ids=lambda _: "text")
def test_show_prints_any_text_and_reads_none(text, tmp_path, capsys):
    path = tmp_path / "plan.json"
    name = "".join(char for char in text if char.isprintable())  # no plan holds another
    plan_with(text, name=f"layer.0.{name}").save(path)
    assert main(["show", str(path)]) == 0
    assert_plain(capsys.readouterr().out)


def test_markup_is_shown_as_it_is_written(tmp_path, capsys):
    plan_with("[/x] [bold]b :smile: \x1b[2J").save(tmp_path / "plan.json")
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    assert "[/x] [bold]b :smile: \\x1b[2J" in capsys.readouterr().out


@pytest.mark.parametrize("text", [*texts(1, 30), "\ud800"], ids=lambda _: "text")
@pytest.mark.parametrize("command", [["show"], ["estimate"], ["train", "--config"], ["select", "--config"], ["bench"]])
def test_an_error_is_one_printable_line(command, text, capsys):
    assert main([*command, text.replace("\x00", "")[:200] + ".none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("weightlora: error: ")
    assert error.count("\n") == 1
    assert_plain(error)


def test_a_warning_is_printable(capsys):
    with one_line_warnings():
        warnings.warn("a\x1b[2Jb", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "weightlora: warning: a\\x1b[2Jb\n"


@pytest.mark.parametrize("text", texts(2, 20), ids=lambda _: "text")
def test_a_benchmarks_table_and_lines_are_printable(text, capsys):
    console = PlainConsole()
    console.print(to_terminal(Table((text, text), ((Cell(text), Cell(text)),))))
    console.print(text)
    assert_plain(capsys.readouterr().out)


def test_every_command_prints_to_the_plain_console():
    """No other file of the command line makes a console."""
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in Path(main.__code__.co_filename).parent.glob("*.py")
    }
    makers = {name for name, text in texts.items() if re.search(r"(?<!Plain)Console\(\)", text)}
    assert makers == set()


def test_numbers_of_any_length_sort_as_numbers():
    """Also digits that ``int`` does not read, and more of them than it reads."""
    names = ["a.2", "a.10", "a.010x", "a.²", "a." + "9" * 5000, "a." + "1" + "0" * 5000]
    expected = ["a.2", "a.10", "a.010x", "a." + "9" * 5000, "a.1" + "0" * 5000, "a.²"]
    assert sorted(names, key=natural) == expected


@pytest.mark.parametrize(("edge", "digits"), [(100, 1), (1_000, 0)])
def test_gigabytes_lose_a_digit_where_the_number_gains_one(edge, digits):
    for step in range(-1_000, 1_001):
        count = edge * 10**9 + step * 10**6
        text = gigabytes(count)
        lost = digits if step >= -500 * 10.0 ** -(digits + 1) else digits + 1  # from there on it rounds to the edge
        assert len(text) == 5
        assert abs(float(text.replace(",", "")) - count / 1e9) <= 0.5001 * 10.0**-lost


@pytest.mark.parametrize("whole", [0, 7, 999, 1_000, 1_001, 9_999, 10_000, 999_999])
def test_whole_numbers_are_shown_with_all_digits(whole):
    assert rounded(whole) == f"{whole:,}"
    assert rounded(-whole) == f"{-whole:,}"
