"""``weightlora estimate`` without a plan: a config alone, a table that fits, and one line for a mistake."""

import json

import pytest

from weightlora.cli import main
from weightlora.cli._screen import PlainConsole
from weightlora.cli.estimate import _memory_table
from weightlora.cost.estimate import MemoryLine
from weightlora.cost.memory import Memory

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES, "max_position_embeddings": 64}))
    return path


def run(capsys, *words):
    assert main(["estimate", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    return printed


def test_the_command_needs_a_config_alone(config_file, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    words = ("--model_name_or_path", config_file, "--batch", "4x32")
    printed = run(capsys, *words, "--memory", "24GB", "--adapters", "7", "--fsdp", "2", "--gradient_checkpointing")
    title, _, _, *lines = printed.splitlines()
    assert "computed" in title
    assert "2 devices" in " ".join(printed.split())
    names = [
        "full fine-tuning",
        "LoRA",
        *(f"WeightLoRA{plus} {end}" for plus in ("", "+") for end in ("upper", "lower")),
    ]
    assert [line[:17].strip() for line in lines[: len(names) + 1] if line[17:].strip()][-len(names) :] == names
    for name in ("trained", "weights", "saved", "logits", "peak", "rows"):
        assert any(line.startswith(f"{name} ") for line in lines), f"{name} is not explained"


def test_floors_of_a_training_with_a_store_are_one_table(config_file, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    printed = run(capsys, "--model_name_or_path", config_file, "--batch", "4x32", "--store", "1000000x3")
    rows = [line.split() for line in printed.splitlines() if "/" in line[:5] or line.startswith("    0")]
    assert [row[0] for row in rows] == ["0", "1/6", "1/3", "1/2", "2/3", "5/6"]
    assert [row[1] for row in rows] == ["28", "21", "21", "14", "7", "7"]  # of four blocks 1, 1, 2, 3 and 3 are below
    assert [row[-1] for row in rows] == ["0.00", *["2.05"] * 5]  # 32 tokens of 16 numbers in four bytes
    assert "1,000,000 rows, 3 epochs" in " ".join(printed.split())
    for name in ("below", "time", "away", "weights", "saved", "peak", "store"):
        assert f"\n{name} " in printed, f"{name} is not explained"


def test_a_quantised_model_is_not_tuned_in_full(config_file, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    words = ("--model_name_or_path", config_file, "--batch", "4x32", "--adapters", "7")
    whole, four, eight = (run(capsys, *words, *more) for more in ([], ["--load_in_4bit"], ["--load_in_8bit"]))
    assert "full fine-tuning" in whole
    assert "full fine-tuning" not in four
    assert "full fine-tuning" not in eight


def test_the_table_of_the_largest_numbers_fits(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    most = Memory(999_990_000_000, *[9_999_000_000_000] * 6)
    PlainConsole().print(_memory_table([MemoryLine("WeightLoRA+ lower", 99_999, most, 9_999_999)], "GB", "24GB"))
    assert "9,999,999" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch", "4x32"], "give a plan.json, or --model_name_or_path"),
        (["--model_name_or_path", "CONFIG", "--batch", "4x65"], "the model reads 64 at most"),
        (["--model_name_or_path", "CONFIG", "--batch", "4x32", "--memory", "24"], "--memory '24' is not allowed"),
        (["--model_name_or_path", "CONFIG", "--batch", "4x32", "--memory", "0GB"], "--memory '0GB' is not allowed"),
        (["--model_name_or_path", "CONFIG", "--batch", "4"], "--batch '4' is not allowed"),
        (
            ["--model_name_or_path", "CONFIG", "--batch", "4x32", "--adapters", "29"],
            "adapters=29 exceeds the 28 candidate sites",
        ),
        (["--model_name_or_path", "CONFIG", "--batch", "4x32", "--adapters", "2x"], "adapters='2x' is not allowed"),
        (["--model_name_or_path", "CONFIG", "--batch", "4x32", "--optim", "adam"], "optim='adam' is unknown"),
        (
            ["--model_name_or_path", "CONFIG", "--batch", "4x32", "--fsdp", "0"],
            "--fsdp=0 is not allowed: give a number of at least 1",
        ),
        (["--model_name_or_path", "CONFIG", "--batch", "4x32", "--double_quant"], "needs --load_in_4bit"),
        (["--model_name_or_path", "CONFIG", "--batch", "4x32", "--fast"], "--fast needs a plan"),
        (["--model_name_or_path", "./none.json", "--batch", "4x32"], "cannot read a config from --model_name_or_path"),
        (
            ["--model_name_or_path", "CONFIG", "--batch", "4x32", "--store", "3"],
            "--store '3' is not allowed: give rows x",
        ),
        (
            ["--model_name_or_path", "CONFIG", "--batch", "4x32", "--store", "9x3", "--memory", "1GB"],
            "--store prints floors, without --memory and --adapters",
        ),
        (["plan.json", "--batch", "4x32", "--memory", "24GB"], "--memory is for estimates without a plan"),
    ],
)
def test_a_mistake_is_one_line(words, says, config_file, capsys):
    assert main(["estimate", *[str(config_file) if word == "CONFIG" else word for word in words]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_model_of_another_kind_is_one_line(tmp_path, capsys):
    """ViT reads no tokens; this T5 does not say with which token its decoder starts."""
    for config, says in (({"model_type": "vit"}, "ViTConfig"), ({"model_type": "t5", "num_layers": 1}, "does not run")):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        assert main(["estimate", "--model_name_or_path", str(path), "--batch", "1x8"]) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert len(captured.err.splitlines()) == 1
