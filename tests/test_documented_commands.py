"""Commands of README and guides are run as they are written, on small files and a small model in their place."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from test_documents import documented, own
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from weightlora.bench.records import read_records
from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.tasks.embedded import smollm2

# Few batches, and layers so small that the fast step does not pay.
pytestmark = pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")
ROOT = Path(__file__).parent.parent
#: Of a command: tests/cli/test_demo.py, tests/test_documents.py and tests/paper run these.
ELSEWHERE = ("demo", "show", "methods", "doctor", "paper")
#: Of a command: it is run below, with more in the place of what it names.
BELOW = ("rte", "recipes/", "bench")
ROWS = [f"a {word} film number {i},{word}" for i in range(16) for word in ("good", "bad")]
SHORT = [
    *("--max_steps", "20", "--max_train_samples", "24", "--max_eval_samples", "8", "--max_seq_length", "12"),
    *("--per_device_train_batch_size", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
    *("--save_strategy", "no", "--logging_strategy", "no"),
]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def commands():
    found = {shlex.join(words): words for words in filter(None, map(own, documented()))}
    return [words for text, words in found.items() if not any(part in text for part in (*ELSEWHERE, *BELOW))]


def only(*parts):
    """The one command with these parts."""
    (found,) = {
        shlex.join(words): words for words in documented() if all(part in shlex.join(words) for part in parts)
    }.values()
    return found


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **SIZES)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory, small_model):
    """Every file that the documents name."""
    folder = tmp_path_factory.mktemp("named") / "files"
    (folder / "runs" / "train").mkdir(parents=True)
    for name in ("reviews.csv", "more.csv"):
        (folder / name).write_text("\n".join(["text,label", *ROWS]))
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text("\n".join(["review,label", *ROWS]))
    for name in ("mine.yaml", "select.yaml", "recipe.yaml"):
        (folder / name).write_text("task: rotten_tomatoes\nadapters: 5\n")
    recipe = ["--config", str(folder / "recipe.yaml"), "--model_name_or_path", str(small_model), *SHORT]
    assert main(["select", *recipe, "--output_dir", str(folder / "runs" / "select")]) == 0
    for name in ("plan.json", "runs/train/plan.json"):
        AdapterPlan.load(folder / "runs/select/plan.json").save(folder / name)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, **SIZES))
    base.save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:  # the adapter names its base
        patch.chdir(folder)
        lora = LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained("base"), lora).save_pretrained("adapter")
    shutil.copytree(folder / "adapter", folder / "runs/train/adapter")
    shutil.copy(folder / "recipe.yaml", folder / "runs/train/config.yaml")
    return folder


@pytest.fixture
def here(named, tmp_path, monkeypatch):
    """A folder of one's own with every file that the documents name."""
    shutil.copytree(named, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands_to_run():
    known = {"select", "train", "estimate", "emit", "check", "export", "squeeze", "report", "analyse"}
    assert {words[0] for words in commands()} == known
    assert len(commands()) >= 12


@pytest.mark.sampled(8)
@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_commands_run(words, here, small_model):
    if words[0] == "estimate":
        assert main([*words, "--model_name_or_path", str(small_model)]) == 0
        return
    if words[0] in ("emit", "report", "squeeze"):
        assert main(words) == 0
        return
    if words[0] in ("check", "export"):
        assert main(words) == (words[0] == "check")  # not all runtimes read values without queries
        return
    changed = [] if words[0] == "select" else ["--output_dir", str(here / "out")]
    changed += ["--adapters", "5"] * (words[0] == "analyse")  # of twelve sites
    changed += ["--time", "1.0"] * ("--time" in words)  # a step of a millisecond is mostly what no choice saves
    assert main([*words, "--model_name_or_path", str(small_model), *SHORT, *changed]) == 0


@pytest.mark.usefixtures("here")
def test_a_task_and_a_model_of_the_hub(small_model):
    rows = [{"sentence1": text, "sentence2": text, "label": i % 2} for i, text in enumerate(ROWS)]
    DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")}).save_to_disk("rte")
    changed = ["--model_name_or_path", str(small_model), "--dataset_name", "rte", "--adapters", "5", *SHORT]
    assert main([*own(only("--task rte")), *changed, "--output_dir", "out"]) == 0


@pytest.mark.slow
def test_a_recipe_of_the_repository(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2().parent), gguf_file=smollm2().name)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(ROOT)
    changed = ["--model_name_or_path", str(tmp_path / "model"), *SHORT, "--max_seq_length", "128"]
    changed += ["--max_steps", "2", "--warmup_steps", "0", "--output_dir", str(tmp_path / "out")]
    assert main([*own(only("recipes/smollm2-reasoning.yaml")), *changed]) == 0


@pytest.mark.slow
def test_a_benchmark_of_the_guide(here, small_model, capsys):
    guide = (ROOT / "docs" / "guides" / "methods.md").read_text()
    (here / "b.yaml").write_text(guide.partition("```yaml\n")[2].partition("```")[0])
    changed = ["--model_name_or_path", str(small_model), *SHORT, "--max_steps", "3", "--held_out_samples", "4"]
    changed += ["--adapters", "5", "--learning_rate", "1e-3", "--warmup_steps", "0", "--seed", "0"]  # for its lists
    for flag in ("--workers", "--table", "--retry"):
        assert main([*own(only("weightlora bench --config b.yaml", flag)), *changed]) == 0
    records = read_records(here / "runs" / "b" / "records.jsonl")
    assert [record["status"] for record in records] == ["ok"] * 5
    capsys.readouterr()
    assert main([*own(only("weightlora bench --config b.yaml", "--dry_run")), *changed]) == 0
    assert capsys.readouterr().out == "5 of 5 runs have records.\n"
    for name in ("here", "there"):
        shutil.copytree("runs/b", f"runs/{name}")
    assert main(own(only("bench merge"))) == 0
    assert main([*own(only("weightlora bench --config b.yaml", "--output_dir runs/both")), *changed]) == 0
    assert read_records(here / "runs" / "both" / "records.jsonl") == records


@pytest.mark.slow
def test_differences_that_a_readme_quotes(tmp_path, monkeypatch, capsys):
    results = ROOT / "docs" / "results" / "paper"
    shutil.copy(results / "embedded" / "records.jsonl.gz", tmp_path)
    monkeypatch.chdir(ROOT / "recipes" / "paper")
    for row in ("random, K = 1", "random, K = 5", "random, K = 10", "lora"):
        changed = ["--output_dir", str(tmp_path), "--against", row]
        assert main([*own(only("weightlora bench", "table7")), *changed]) == 0
    printed = capsys.readouterr().out
    section = (results / "README.md").read_text().partition("## Table 7")[2]
    table = section.partition("| ---:")[2].partition("\n\n")[0]
    quoted = re.findall(r"[+-]\d\.\d+ ± \d\.\d+", table.replace("−", "-"))
    assert len(quoted) == 18  # six rows of three differences
    assert not [number for number in quoted if number not in printed]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun --nproc_per_node 2", "accelerate launch --config_file fsdp2.yaml"])
def test_two_processes(launcher, here, small_model):
    words = only(launcher)
    torchrun = ["-m", "torch.distributed.run", "--standalone", *words[1:]]  # the default port may be taken
    accelerate = ["-m", "accelerate.commands.launch", "--main_process_port", "0", *words[2:]]
    guide = (ROOT / "docs" / "guides" / "distributed.md").read_text()
    config = guide.partition("# fsdp2.yaml\n")[2].partition("```")[0]
    (here / "fsdp2.yaml").write_text(f"{config}use_cpu: true\n")
    changed = ["--model_name_or_path", str(small_model), *SHORT, "--max_steps", "2", "--output_dir", str(here / "out")]
    command = [sys.executable, *(torchrun if words[0] == "torchrun" else accelerate), *changed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (here / "out" / "adapter" / "adapter_model.safetensors").is_file()
