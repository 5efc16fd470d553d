"""Commands of README and guides are run as they are written, on small files and a small model in their place."""

import shlex

import pytest
from test_documents import documented, own
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from weightlora.cli import main
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.embedded import minilm as minilm_folder

#: Of a command: needs a model hub, or runs for hours; tests/runs/test_recipes.py and tests/bench have these kinds.
ELSEWHERE = ("rte", "recipes/", "bench", "demo", "show", "methods")
ROWS = [f"a {word} film number {i},{word}" for i in range(16) for word in ("good", "bad")]
SHORT = [
    *("--max_steps", "20", "--max_train_samples", "24", "--max_eval_samples", "8", "--max_seq_length", "12"),
    *("--per_device_train_batch_size", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
    *("--save_strategy", "no", "--logging_strategy", "no"),
]


def commands():
    found = {shlex.join(words): words for words in filter(None, map(own, documented()))}
    return [words for text, words in found.items() if not any(part in text for part in ELSEWHERE)]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, small_model, monkeypatch):
    """A folder with every file that the documents name."""
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.csv", "more.csv"):
        (tmp_path / name).write_text("\n".join(["text,label", *ROWS]))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("\n".join(["review,label", *ROWS]))
    for name in ("mine.yaml", "select.yaml", "recipe.yaml"):
        (tmp_path / name).write_text("task: rotten_tomatoes\nkeep: 5\n")
    select = ["select", "--model_name_or_path", str(small_model), *SHORT, "--output_dir", "runs/select"]
    assert main(select) == 0
    AdapterPlan.load("runs/select/plan.json").save("plan.json")
    return tmp_path


def test_there_are_commands_to_run():
    assert {words[0] for words in commands()} == {"select", "train", "estimate", "analyse"}
    assert len(commands()) >= 12


@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")  # few batches, and calls that are small
@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_commands_run(words, here, small_model):
    if words[0] == "estimate":
        assert main([*words, "--model_name_or_path", str(small_model)]) == 0
        return
    changed = [] if words[0] == "select" else ["--output_dir", str(here / "out")]
    changed += ["--keep", "5"] * (words[0] == "analyse")  # of twelve sites
    assert main([*words, "--model_name_or_path", str(small_model), *SHORT, *changed]) == 0
