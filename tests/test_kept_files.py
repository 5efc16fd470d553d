"""Every command that writes a folder: what it did not write itself stays as it is, or one line says why it stops."""

import os
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from small_run import TRAINING, words, write_base
from transformers import LlamaConfig, LlamaForCausalLM

from weightlora.cli import main
from weightlora.errors import OutputError
from weightlora.files import DRAFT
from weightlora.folders import whole_folder
from weightlora.plan.plan import read_adapter

#: They write beside what is there; the others replace a folder.
BESIDE = ("select", "train", "bench", "paper", "analyse")
#: In a test that runs it; a benchmark takes long to start its process, and the paper's is one.
RUN = [pytest.param(name, marks=pytest.mark.slow) if name in ("bench", "paper") else name for name in BESIDE]
WHOLE = ("export", "emit", "squeeze", "save_adapter")
#: Each keeps the name, so that ``paper`` can write there: it makes a folder for its size.
NAME = "embedded"


@dataclass(frozen=True)
class Bed:
    """What the commands read, and what each of them has written into a folder of its own."""

    folder: Path

    def run(self, command: str, output: Path) -> int:
        """Exit code of a command that writes to ``output``."""
        if command == "save_adapter":
            plan = read_adapter(self.folder / "adapter")
            model = AutoPeftModelForCausalLM.from_pretrained(self.folder / "adapter")
            try:
                plan.save_adapter(model, output)
            except OutputError as error:
                print(f"weightlora: error: {error}", file=os.sys.stderr)
                return 2
            return 0
        recipe = words(self.folder / "base", output)[1:]
        small = [self.folder / "recipes", "--output_dir", output.parent]
        few = ["--max_train_samples", "8", "--max_eval_samples", "8", "--max_steps", "1", "--use_cpu"]
        of = {
            "select": recipe,
            "train": recipe,
            "bench": ["--config", self.folder / "recipes" / "small.yaml#grid", "--output_dir", output],
            "demo": [*few, "--output_dir", output],
            "paper": ["small", "--recipes", *small],
            "analyse": ["dot-product", *recipe],
            "export": [self.folder / "adapter", "--for", "mlx", "--output_dir", output],
            "emit": [self.folder / "plan.json", "--for", "axolotl", "--output_dir", output],
            "squeeze": [self.folder / "adapter", "--max_rank", "1", "--output_dir", output],
            "report": [self.folder / "plan.json", "--output", output],
        }
        return main([command, *map(str, of[command])])


@pytest.fixture(scope="module")
def bed(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bed")
    (folder / "base").mkdir()
    base = write_base(folder / "base", tokenizer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    llama.save_pretrained(folder / "llama")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "llama"), lora)
    adapted.save_pretrained(folder / "adapter")
    read_adapter(folder / "adapter").save(folder / "plan.json")
    left = (
        "task",
        "adapters",
        "save_steps",
        "logging_steps",
        "learning_rate",
        "rule_options",
        "disable_tqdm",
        "report_to",
    )
    options = {name: value for name, value in TRAINING.items() if name not in left}
    files = {"model_name_or_path": str(base), "train_file": str(base / "rows.csv")}
    run = {**files, "validation_file": str(base / "rows.csv"), **options, "max_steps": 1}
    grid = {"base": run, "tasks": ["text_classification"], "methods": ["lora"], "learning_rates": [1e-2]}
    (folder / "recipes").mkdir()
    grid |= {"seeds": [0], "timing_rounds": 0, "keep_adapters": True}
    study = {"title": "Small", "place": "Table 7", "kind": "table"}
    study["embedded"] = {"configs": ["small.yaml#grid"], "differs": "all is small"}
    (folder / "recipes" / "small.yaml").write_text(yaml.safe_dump({"study": study, "grid": grid}))
    return Bed(folder)


@pytest.fixture(scope="module")
def made(bed, tmp_path_factory):
    """A function that copies what a command writes into a new folder."""

    @cache
    def of(command):
        output = tmp_path_factory.mktemp(command) / NAME
        assert bed.run(command, output) == 0
        return output

    return lambda command, target: shutil.copytree(of(command), target)


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(capsys):
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weightlora: error: ")]
    assert len(said) == 1, said
    return said[0]


# -- files of the user -----------------------------------------------------------------------------------------------


THESIS = (Path("drafts/thesis.txt"), Path("thesis.txt"))


def add(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("start", ["new", "written before"])
@pytest.mark.parametrize("command", RUN)
def test_a_command_writes_beside_files_of_the_user(command, start, bed, made, tmp_path):
    output = tmp_path / NAME
    if start == "written before":
        made(command, output)
    elif command in ("bench", "paper"):
        pytest.skip("test_a_benchmark_here_leaves_the_folder_runs does it: a process for runs takes long to start")
    add(output, *THESIS)
    assert bed.run(command, output) == 0
    assert all((output / name).read_text() == "years of work" for name in THESIS)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("lost", THESIS, ids=str)
@pytest.mark.parametrize("start", ["new", "written before"])
@pytest.mark.parametrize("command", WHOLE)
def test_a_folder_with_a_file_of_the_user_is_not_replaced(command, start, lost, bed, made, tmp_path, capsys):
    output = tmp_path / NAME
    if start == "written before":
        made(command, output)
    add(output, lost)
    before = everything(output)
    assert bed.run(command, output) == 2
    assert str(lost) in one_line(capsys)
    assert everything(output) == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", [*RUN, *WHOLE])
def test_the_same_command_replaces_what_it_wrote(command, bed, made, tmp_path):
    output = made(command, tmp_path / NAME)
    before = everything(output)
    assert bed.run(command, output) == 0
    assert everything(output).keys() == before.keys()


@pytest.mark.parametrize("command", WHOLE)
def test_an_empty_folder_is_used(command, bed, tmp_path):
    (tmp_path / "empty").mkdir()
    assert bed.run(command, tmp_path / "empty") == 0
    assert everything(tmp_path / "empty")


CHANGED = {
    "select": ["plan.json", "heatmap.png", "knee.png"],
    "bench": ["table.md", "table.tex"],
    "paper": ["small.md", "small.tex"],
    "analyse": ["dot_product.json", "dot_product.png"],
    "export": ["adapters.safetensors", "README.md"],
    "emit": ["axolotl.yaml"],
    "squeeze": ["adapter_model.safetensors", "README.md"],
    "save_adapter": ["README.md", "plan.json"],
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in CHANGED.items() for name in names])
def test_a_file_that_the_user_changed_stays(command, name, bed, made, tmp_path, capsys):
    output = made(command, tmp_path / NAME)
    with (output / name).open("a") as file:
        file.write("# mine")
    before = everything(output)
    assert bed.run(command, output) == 2
    assert name in one_line(capsys)
    assert everything(output) == before


@pytest.mark.parametrize("name", ["config.yaml", "heatmap.png", "adapter/README.md", "checkpoint-2/README.md"])
def test_a_changed_file_of_a_finished_run_stays(name, bed, made, tmp_path):
    output = made("train", tmp_path / NAME)
    with (output / name).open("a") as file:
        file.write("# mine")
    before = everything(output)
    assert bed.run("train", output) == 0
    assert everything(output) == before


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("command", "adapter", "results"),
    [("train", "adapter", "results.json"), ("bench", "adapters/*", "records.jsonl")],
)
@pytest.mark.parametrize("name", ["README.md", "thesis.txt"])
def test_an_adapter_that_is_written_again_loses_nothing(command, adapter, results, name, bed, made, tmp_path, capsys):
    output = made(command, tmp_path / NAME)
    (output / results).unlink()
    [folder] = output.glob(adapter)
    with (folder / name).open("a") as file:
        file.write("mine")
    before = everything(output)
    assert bed.run(command, output) == 2
    assert name in one_line(capsys)
    assert everything(output) == before


OURS = {
    "select": ["plan.json", "heatmap.png", "knee.png"],
    "train": ["config.yaml", "plan.json", "heatmap.png", "before.json", "results.json", "adapter/a.txt"],
    "bench": ["table.md", "table.tex", "records.jsonl"],
    "demo": ["table.md", "table.tex", "records.jsonl", "plan.json", "heatmap.png"],
    "paper": ["small.md", "small.tex", "small.png", "small.pdf", "records.jsonl"],
    "analyse": ["dot_product.json", "dot_product.png"],
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in OURS.items() for name in names])
def test_a_file_of_the_user_with_one_of_our_names_stays(command, name, bed, tmp_path, capsys):
    output = tmp_path / NAME
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text('{"mine": 1}\n')
    assert bed.run(command, output) == 2
    assert Path(name).name in one_line(capsys)
    assert everything(output) == {Path(name): b'{"mine": 1}\n'}


def test_a_deleted_checkpoint_leaves_the_file_of_the_user(bed, tmp_path):
    output = tmp_path / "run"
    few = words(bed.folder / "base", output, save_total_limit=1)
    (output / "checkpoint-2").mkdir(parents=True)
    assert main(words(bed.folder / "base", tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", output / "checkpoint-2", dirs_exist_ok=True)
    for name in ("plan.json", "config.yaml", ".weightlora.json"):
        if (tmp_path / "whole" / name).exists():
            shutil.copy(tmp_path / "whole" / name, output)
    settings = yaml.safe_load((output / "config.yaml").read_text())
    (output / "config.yaml").write_text(yaml.safe_dump({**settings, "save_total_limit": 1}))
    (output / "checkpoint-2" / "thesis.txt").write_text("years of work")
    assert main(few) == 0
    assert everything(output / "checkpoint-2") == {Path("thesis.txt"): b"years of work"}
    assert (output / "checkpoint-6" / "plan.json").exists()
    assert not (output / "checkpoint-4").exists()


def test_drafts_that_a_killed_process_left_are_not_counted(tmp_path):
    output = tmp_path / NAME
    for text in ("first", "second"):
        with whole_folder(output, "weightlora export") as draft:
            (draft / "card.md").write_text(text)
        add(output, f"{DRAFT}killed/card.md")
    assert (output / "card.md").read_text() == "second"
    add(output, "own/card.md")
    with pytest.raises(OutputError, match=r"own/card\.md"), whole_folder(output, "weightlora export"):
        pass


# -- particular folders ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_benchmark_here_leaves_the_folder_runs(bed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "train").mkdir(parents=True)
    (tmp_path / "runs" / "train" / "adapter.txt").write_text("a day of training")
    add(tmp_path, *THESIS)
    assert bed.run("bench", Path()) == 0
    assert (tmp_path / "runs" / "train" / "adapter.txt").read_text() == "a day of training"
    assert all((tmp_path / name).read_text() == "years of work" for name in THESIS)
    written = {"adapters", "records.jsonl", "table.md", "table.tex"}
    assert {path.name for path in tmp_path.glob("[!.]*")} == {*written, "runs", "drafts", "thesis.txt"}
    assert [path.name for path in tmp_path.glob(".*") if path.is_dir()] == []


@pytest.mark.parametrize("output", ["adapter", "adapter/../adapter", "link", "adapter/served", ".", "inside"])
def test_an_export_does_not_touch_the_adapter(output, bed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bed.folder / "adapter", tmp_path / "at" / "adapter")
    (tmp_path / "at" / "link").symlink_to("adapter")
    (tmp_path / "at" / "inside").symlink_to("adapter/served")
    before = everything(tmp_path)
    assert main(["export", "at/adapter", "--for", "mlx", "--output_dir", f"at/{output}"]) == 2
    assert "adapter" in one_line(capsys)
    assert everything(tmp_path) == before


def test_a_link_to_a_folder_stays_a_link(bed, made, tmp_path, capsys):
    made("export", tmp_path / "disk")
    (tmp_path / "served").symlink_to("disk")
    assert bed.run("export", tmp_path / "served") == 0
    assert (tmp_path / "served").is_symlink()
    (tmp_path / "disk" / "thesis.txt").write_text("years of work")
    assert bed.run("export", tmp_path / "served") == 2
    assert "thesis.txt" in one_line(capsys)


def test_a_link_in_the_folder_is_a_file_of_the_user(bed, made, tmp_path, capsys):
    output = made("export", tmp_path / "served")
    (tmp_path / "README.md").write_bytes((output / "README.md").read_bytes())
    (output / "README.md").unlink()
    (output / "README.md").symlink_to(tmp_path / "README.md")
    assert bed.run("export", output) == 2
    assert "README.md" in one_line(capsys)
    assert (output / "README.md").is_symlink()


@pytest.mark.parametrize("command", ["export", "emit", "save_adapter", "report"])
def test_the_folder_that_one_works_in_is_not_replaced(command, bed, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert bed.run(command, Path()) == 2
    one_line(capsys)
    assert Path.cwd().exists()
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


@pytest.mark.parametrize("long", ["x" * 300, f"{'x' * 300}/out"])
@pytest.mark.parametrize("command", [*BESIDE, *WHOLE, "demo", "report"])
def test_a_name_that_is_too_long_is_one_line(command, long, bed, tmp_path, capsys):
    assert bed.run(command, tmp_path / long / NAME if command == "paper" else tmp_path / long) == 2
    assert re.search("name too long", one_line(capsys))
    assert list(tmp_path.iterdir()) == []


# -- a folder belongs to one command ---------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize("record", [True, False], ids=["with its record", "as earlier versions left it"])
@pytest.mark.parametrize("owner", [*RUN, *WHOLE])
def test_a_folder_belongs_to_one_command(owner, record, bed, made, tmp_path, capsys):
    output = made(owner, tmp_path / NAME)
    if not record:
        for file in output.rglob(".weightlora.json"):
            file.unlink()
    before = everything(output)
    for command in (*BESIDE, "demo", *WHOLE):
        unknown = not record and (owner, command) != ("train", "select")
        if command == owner or (unknown and command not in WHOLE):
            continue  # without a record, files that a command does not write are the user's
        assert bed.run(command, output) == 2, command
        said = one_line(capsys)
        assert str(output) in said
        assert everything(output) == before
        if record and command not in WHOLE:
            assert f"{output} belongs to {'' if owner == 'save_adapter' else 'weightlora '}{owner}; choose" in said


def test_train_takes_the_plan_of_another_folder(bed, made, tmp_path, capsys):
    output = made("select", tmp_path / NAME)
    assert bed.run("train", output) == 2
    wanted = f"--plan {output / 'plan.json'} --output_dir runs/train"
    assert wanted in one_line(capsys)
    plan = words(bed.folder / "base", tmp_path / "run", adapters=None, steps=None, rule_options=None)
    assert main([*plan, "--plan", str(output / "plan.json")]) == 0
    assert (tmp_path / "run" / "plan.json").exists()


@pytest.mark.parametrize("owner", ["train", pytest.param("bench", marks=pytest.mark.slow)])
def test_a_folder_of_an_earlier_version_is_recognised(owner, bed, made, tmp_path, capsys):
    output = made(owner, tmp_path / NAME)
    for name in (".weightlora.json", "plan.json", "heatmap.png", "table.md", "table.tex"):
        (output / name).unlink(missing_ok=True)
    before = everything(output)
    for command in {"select", "train", "bench", "analyse"} - {owner}:
        assert bed.run(command, output) == 2
        assert f"{output} belongs to weightlora {owner}" in one_line(capsys)
        assert everything(output) == before
    assert bed.run(owner, output) == 0
