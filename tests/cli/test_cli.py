"""The command line: light to start, one clear line for a mistake, nothing half-written; what ``doctor`` finds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from weightlora.cli import doctor, main
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.embedded import minilm as minilm_folder

COMMANDS = ("demo", "select", "train", "bench", "show", "estimate", "methods", "analyse")
REVIEWS = "text,label\n" + "".join(f"a {word} film number {i},{word}\n" for i in range(12) for word in ("good", "bad"))
QUICK = [
    *(
        "--steps",
        "2",
        "--rule",
        "first_order",
        "--rule_options",
        "head_steps=0",
        "--per_device_train_batch_size",
        "4",
        "--max_seq_length",
        "16",
    ),
    *("--task", "text_classification", "--use_cpu", "--report_to", "none"),
]


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text(REVIEWS)
    return path


def failure(capsys, *words):
    """Run a command that must fail as a user's mistake does; return its one line."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"weightlora: error: [^\n]+\n", captured.err), captured.err
    return captured.err


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_there_and_imports_nothing_heavy(command):
    words = [sys.executable, "-X", "importtime", "-m", "weightlora", *command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "weightlora" in imported
    assert imported.isdisjoint({"torch", "peft", "transformers", "matplotlib", "numpy"})
    assert "example:" in done.stdout


#: Ctrl-C as the module ``name`` is looked for; then a way to start the command.
CTRL_C = """
import os, signal, sys
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
sys.argv = ["weightlora", "select", "--task=rotten_tomatoes", "--output_dir=run"]
"""
STARTS = {
    "python -m": 'import runpy; runpy.run_module("weightlora", run_name="__main__")',
    "console script": "from {} import {}; sys.exit({}())",
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "name", ["weightlora.cli", "argparse", "weightlora.cli.train", "weightlora.runs.recipe", "torch"]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(name, start, tmp_path):
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, function = re.search(r'^weightlora = "([\w.]+):(\w+)"$', settings, re.MULTILINE).groups()
    code = CTRL_C.format(name=name) + STARTS[start].format(module, function, function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "weightlora: stopped\n", "")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train --adapter 0.5", "unknown option '--adapter' (closest: 'adapters')"),
        ("train --learning_rte 1e-3", "unknown option '--learning_rte' (closest: 'learning_rate')"),
        ("select --task chat --packin", "unknown option '--packin' (closest: 'packing')"),
        ("train --task rotten_tomatos", "closest: 'rotten_tomatoes'"),
        ("train --rule first_oder", "closest: 'first_order'"),
        ("train --method weigthlora", "closest: 'weightlora'"),
        ("train --lora_r abc", "lora_r='abc' is not allowed: give a whole number"),
        ("train --lora_r 0", "lora_r=0 is not allowed"),
        ("select --adapters 7.5", "adapters=7.5 is not allowed"),
        ("demo --steps 1", "steps=1 is not allowed"),
        ("train --fast both", "fast='both' is not allowed: give 'input' or 'rank'"),
        ("train --load_in_4bit perhaps", "perhaps"),
        ("train --config r.yaml", "r.yaml: unknown option 'adaptors' (closest: 'adapters')"),
        ("bench --config b.yaml --adapter 1", "unknown option '--adapter' (closest: 'adapters')"),
    ],
)
def test_a_typing_mistake_is_told_before_torch_is_imported(words, says, tmp_path):
    (tmp_path / "r.yaml").write_text("adaptors: 3\n")
    (tmp_path / "b.yaml").write_text("methods: [weightlora]\nlearning_rates: [1.0e-3]\n")
    command = [sys.executable, "-X", "importtime", "-m", "weightlora", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert done.returncode == 2
    assert "weightlora" in imported
    assert imported.isdisjoint({"torch", "peft", "transformers", "datasets", "numpy"})
    assert says in next(line for line in lines if line.startswith("weightlora: error: "))


def test_methods_lists_the_registry(capsys):
    from weightlora.methods import METHODS

    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(entry.name in printed for entry in METHODS)


def test_methods_lists_the_rules_and_their_settings(capsys):
    from weightlora.selection.rules import RULES

    assert main(["methods", "--rules"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{entry.name} {entry.summary}" in printed for entry in RULES)
    assert "gate_lr=5.0" in printed
    assert main(["methods", "--rules", "--tasks"]) == 2


def test_methods_lists_the_tasks(capsys):
    from weightlora.tasks import TASKS

    assert main(["methods", "--tasks"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {task.name} " in printed for task in TASKS)


def test_select_writes_a_plan_that_fits_the_model(reviews, tmp_path, minilm, capsys):
    out = tmp_path / "out"
    assert main(["select", "--train_file", str(reviews), "--adapters", "5", "--output_dir", str(out), *QUICK]) == 0
    plan = AdapterPlan.load(out / "plan.json")
    assert len(plan.names) == 5
    plan.check_sites(minilm)
    assert {path.name for path in out.glob("[!.]*")} == {"plan.json", "heatmap.png", "knee.png"}
    assert (out / "heatmap.png").stat().st_size > 1000
    assert (out / "knee.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(plan) in printed
    assert "5 of 36 adapters" in printed

    assert main(["show", str(out / "plan.json")]) == 0
    assert "5 of 36 adapters" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_without_scores_has_no_knee_plot_not_even_an_old_one(reviews, tmp_path, capsys):
    words = ["select", "--train_file", str(reviews), "--output_dir", str(tmp_path), *QUICK]
    assert main(words) == 0
    assert (tmp_path / "knee.png").exists()
    capsys.readouterr()
    words = [
        word
        for word in words
        if word not in ("--steps", "2", "--rule", "first_order", "--rule_options", "head_steps=0")
    ]
    assert main([*words, "--method", "random"]) == 0
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"plan.json", "heatmap.png", reviews.name}
    assert "of the gain" not in capsys.readouterr().out


def test_config_file_and_command_line_agree_and_the_command_line_wins(reviews, tmp_path):
    config = tmp_path / "r.yaml"
    config.write_text(
        f"train_file: {reviews}\nadapters: 3\nmethod: weightlora_plus\nseed: 7\noutput_dir: {tmp_path / 'a'}\n"
    )
    own = [word for word in QUICK if word not in ("--rule", "first_order", "--rule_options", "head_steps=0")]
    assert main(["select", "--config", str(config), *own]) == 0
    # 0.5 is the option's default: it must still win over the file.
    assert (
        main(["select", "--config", str(config), *own, "--adapters", "0.5", "--output_dir", str(tmp_path / "b")]) == 0
    )
    from_file, overridden = (AdapterPlan.load(tmp_path / name / "plan.json") for name in "ab")
    assert (len(from_file.names), from_file.seed, from_file.options["expand"]) == (3, 7, "ranks")
    assert len(overridden.names) == 36 // 2


@pytest.mark.slow
def test_fast_changes_no_score(reviews, tmp_path):
    """There is no dropout here, so that both kinds of it are PEFT's numbers."""
    plans = []
    for words in ([], ["--fast"], ["--fast", "rank"]):
        out = tmp_path / f"out{len(plans)}"
        assert main(["select", "--train_file", str(reviews), *QUICK, *words, "--output_dir", str(out)]) == 0
        plans.append(AdapterPlan.load(out / "plan.json"))
    stock, *fast = plans
    assert [plan.options.get("fast") for plan in plans] == [None, "input", "rank"]
    for plan in fast:
        assert plan.scores == pytest.approx(stock.scores, rel=1e-4)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--adapters", "0", "adapters=0 is"),
        ("--adapters", "-1", "adapters=-1"),
        ("--adapters", "nan", "adapters=nan"),
        ("--adapters", "1.5", "adapters=1.5"),
        ("--adapters", "37", "adapters=37 exceeds the 36 candidate sites"),
        ("--adapters", "half", "adapters='half'"),
        ("--steps", "1", "steps=1"),
        ("--rule", "loudest", "rule='loudest'"),
        ("--rule_options", "gate_lr=1", "rule first_order has no setting 'gate_lr'"),
        ("--fast", "very", "fast='very' is not allowed: give 'input' or 'rank'"),
        ("--learning_rate", "0", "learning_rate=0.0"),
        ("--seed", "x", "--seed"),
        ("--lora_target_modules", "qerry", "query"),
        ("--columns", "label=lable", "closest: 'label'"),
        ("--train_file", "missing.csv", "missing.csv"),
        ("--model_name_or_path", "./nowhere", "./nowhere"),
        ("--nonsense", "1", "--nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(reviews, tmp_path, capsys, option, value, says):
    out = tmp_path / "out"
    words = ["--train_file", reviews, "--output_dir", out, *QUICK, option, value]
    assert says in failure(capsys, "select", *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adaptors: 3\n", "closest: 'adapters'"),
        ("adapters: [\n", "cannot read"),
        ("- keep\n", "option: value"),
        ("seed: many\n", "--seed"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path, capsys, text, says):
    config = tmp_path / "r.yaml"
    config.write_text(text)
    assert says in failure(capsys, "select", "--config", config)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_a_bad_plan_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    assert "plan" in failure(capsys, "show", path)


def test_an_unwritable_folder_is_told_before_the_work(reviews, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (["demo"], ["select", "--train_file", reviews]):
        assert "cannot write" in failure(capsys, *command, "--output_dir", tmp_path / "file" / "out")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_plan(tmp_path):
    """Files may grow to one kilobyte: the plan is larger."""
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "from weightlora.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["select", "--output_dir", out, *QUICK, "--task", "rotten_tomatoes", "--max_train_samples", 24]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(out.glob("*")) == []


def test_show_reads_any_peft_adapter(tmp_path, capsys):
    import torch
    from peft import LoraConfig, get_peft_model

    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    get_peft_model(net, LoraConfig(r=3, target_modules=["1"])).save_pretrained(tmp_path / "adapter")
    assert main(["show", str(tmp_path / "adapter"), "--png", str(tmp_path / "a.png")]) == 0
    printed = capsys.readouterr().out
    assert "all 1 adapters at LoRA's rank" in printed
    assert f"this plan {3 * (6 + 2)} " in " ".join(printed.split())
    assert (tmp_path / "a.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 is chosen there")
def test_language_modelling_from_a_folder_needs_no_word_that_this_is_a_cpu(tmp_path):
    """A small random Llama with MiniLM's tokenizer: a language model without a hub. TRL's default is bf16."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(minilm_folder(), eos_token="[SEP]").save_pretrained(tmp_path / "llama")
    lines = [json.dumps({"text": f"sentence number {i} of some text"}) for i in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = [
        "--task",
        "language_modelling",
        "--model_name_or_path",
        tmp_path / "llama",
        "--train_file",
        tmp_path / "text.jsonl",
    ]
    words = [*(word for word in QUICK if word != "--use_cpu"), *map(str, words)]
    assert main(["select", *words, "--output_dir", str(tmp_path / "out")]) == 0
    plan = AdapterPlan.load(tmp_path / "out" / "plan.json")
    assert len(plan.entries) == 14  # two layers of seven projections, and no head
    assert 0 < 2 * plan.parameters <= plan.lora_parameters
    words += ["--validation_file", str(tmp_path / "text.jsonl"), "--max_steps", "2", "--save_steps", "1"]
    words += ["--output_dir", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["bf16"], config["fp16"], config["use_cpu"]) == (False, False, False)
    (tmp_path / "run" / "results.json").unlink()
    assert main(["train", *words]) == 0  # the same run: it goes on from its last checkpoint


@pytest.mark.parametrize("command", ["select", "train", "demo", "analyse dot-product", "bench --config b.yaml"])
def test_a_wrong_budget_is_found_before_anything_is_loaded(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.yaml").write_text("methods: [weightlora]\nlearning_rates: [1.0e-3]\n")
    monkeypatch.setattr("weightlora.runs._load.load_rows", lambda *_, **__: pytest.fail("rows were loaded"))
    assert "adapters=2.5 is not allowed" in failure(
        capsys, *command.split(), "--adapters", "2.5", "--output_dir", "out"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_ordinary_training_prints_nothing_but_its_own_lines_to_standard_error(tmp_path):
    """A GGUF file and TRL: of all bases and tasks those of which the libraries say most."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"sentence number {i}"}) + "\n" for i in range(4)))
    words = ["train", "--task", "language_modelling", "--model_name_or_path", "embedded/smollm2", "--method", "random"]
    words += ["--train_file", "text.jsonl", "--validation_file", "text.jsonl", "--max_steps", "1", "--save_steps", "1"]
    words += ["--max_seq_length", "16", "--disable_tqdm", "true", "--report_to", "none", "--output_dir", "run"]
    command = [sys.executable, "-m", "weightlora", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bars = re.compile(r".*(%\||\d(it|s|B)/(s|it)).*")  # of GGUF's conversion
    lines = [line for line in done.stderr.splitlines() if line.strip() and not bars.fullmatch(line)]
    assert [line for line in lines if not line.startswith("weightlora: ")] == []
    assert "config file" not in done.stderr
    assert "pin_memory" not in done.stderr


# -- ``weightlora doctor`` -------------------------------------------------------------------------------------------


def test_a_whole_installation_is_ready(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    states = re.findall(r"  (ready|.*run: .*)\s*$", said, re.MULTILINE)
    assert states == ["ready"] * 9  # tests are run with every extra and the embedded wheels
    for package in ("torch", "transformers", "peft"):
        assert package in said


@pytest.mark.parametrize(
    ("needed", "fault"),
    [
        ("no-such-package>=1", "no-such-package is missing"),
        ("rich>=999", "rich .* is not >=999"),
        ("rich>=1", ""),
    ],
)
def test_what_is_missing_or_too_old_is_named(needed, fault, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_required", lambda extra: [] if extra else [Requirement(needed)])
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == bool(fault)
    line = next(line for line in capsys.readouterr().out.splitlines() if "Python functions" in line)
    assert re.search(f"{fault}; run: pip install" if fault else "ready", line)


def test_every_extra_has_a_use():
    from importlib.metadata import metadata

    extras = set(metadata("weightlora").get_all("Provides-Extra") or [])
    assert {extra for extra in doctor._USES if extra} == extras - {"all", "dev", "docs"}
