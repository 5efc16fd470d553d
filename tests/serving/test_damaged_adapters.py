"""Damaged adapter folders: `check` and `export` answer, or say in one line what is wrong."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from fuzz import assert_one_line, cases, generator, mutated, tell
from safetensors.torch import load_file, save_file
from small_adapters import HOLES, everywhere, site

from weightlora.cli import main
from weightlora.errors import WeightLoraError
from weightlora.serving import READERS
from weightlora.serving.adapter import read_base, read_files
from weightlora.serving.check import find_problems
from weightlora.serving.export import export

#: Folders; each takes some 20 ms.
COUNT = cases(150, 5_000)
SHOWN = 10
"""One in so many is also given to the commands."""
NAME = "base_model.model." + site(0, "q_proj")


def with_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def with_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def undotted(tensors):
    tensors["stray"] = torch.ones(2, 2)


def integers(tensors):
    tensors |= {name: tensor.long() for name, tensor in tensors.items()}


def both_kinds(tensors):
    tensors[f"{NAME}.lora_embedding_A"] = torch.ones(4, 32)


@pytest.fixture
def folder(save, tmp_path):
    """A copy of an adapter that may be damaged."""
    shutil.copytree(save(target_modules=everywhere("q_proj", "v_proj")).folder, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", ["check", "export"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: with_tensors(folder, undotted), "stray"),
        (lambda folder: with_config(folder, rank_pattern={"unused": "eight"}), "rank_pattern={'unused': 'eight'}"),
        (lambda folder: with_config(folder, alpha_pattern={"unused": "eight"}), "alpha_pattern={'unused': 'eight'}"),
        (lambda folder: with_config(folder, lora_alpha=10**400), "lora_alpha=1000"),
        (lambda folder: with_config(folder, alpha_pattern={"q_proj": 10**400}), "alpha_pattern={'q_proj': 1000"),
        (lambda folder: with_config(folder, base_model_name_or_path=5), "base_model_name_or_path=5"),
        (lambda folder: with_tensors(folder, integers), "of type I64"),
        (lambda folder: with_tensors(folder, both_kinds), "of a linear layer and of an embedding"),
    ],
    ids=["no dot", "rank text", "alpha text", "alpha", "pattern alpha", "base", "int64", "both kinds"],
)
def test_damage_is_one_line(damage, said, command, folder, tmp_path, capsys):
    damage(folder)
    capsys.readouterr()
    out = tmp_path / "out"
    code = main([command, str(folder), "--for", "sglang", *(["--output_dir", str(out)] if command == "export" else [])])
    output = capsys.readouterr()
    assert not out.exists()
    (line,) = [line for line in (output.out + output.err).splitlines() if said in line]
    assert len(line) < 700
    # A tensor that nobody knows is a reason; what PEFT itself cannot read is a mistake.
    assert code == (1 if said == "stray" and command == "check" else 2)
    assert code == 1 or output.err.count("\n") == 1


def damaged(rng, folder, config, tensors):
    """Write the adapter into ``folder`` with one to three things wrong, or none."""
    fields = ["rank_pattern", "alpha_pattern", "use_rslora", "bias", "task_type", "init_lora_weights", "peft_type"]
    text = mutated(rng, json.loads(config), fields) if rng.random() < 0.7 else config
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    kept = dict(tensors)
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice(sorted(kept))
        tensor = kept.pop(name)
        change = rng.choice(("drop", "type", "shape", "rename", "twice"))
        if change == "type":
            kept[name] = tensor.to(rng.choice((torch.int64, torch.bfloat16, torch.bool, torch.float64)))
        elif change == "shape":
            kept[name] = torch.ones(rng.choice(((), (0,), (4,), (4, 0), (5, 32), (4, 33), (1, 4, 32))))
        elif change in ("rename", "twice"):
            other = rng.choice(("x", "", ".", "a.b", name.replace("lora_", "lora_embedding_"), name[:-7], name + "é\n"))
            kept |= {other: tensor.clone()} | ({name: tensor} if change == "twice" else {})
        if not kept:
            break
    save_file(kept, folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_damaged_folders(save, base, tmp_path, capsys):
    rng, counts, names = generator(2), Counter(), [reader.name for reader in READERS]
    saved = [save(target_modules=HOLES, rank_pattern={"q_proj": 2}), save(target_modules=everywhere("v_proj"), r=8)]
    whole = [
        (one.folder.joinpath("adapter_config.json").read_text(), load_file(one.folder / "adapter_model.safetensors"))
        for one in saved
    ]
    layers, folder = read_base(base, "CAUSAL_LM"), tmp_path / "adapter"
    folder.mkdir()
    for i in range(COUNT):
        damaged(rng, folder, *rng.choice(whole))
        name = rng.choice(names)
        try:
            adapter = read_files(folder)
            for reader in READERS:
                find_problems(adapter, reader, rng.choice((None, layers)))
            export(folder, name, tmp_path / "out", base=rng.choice((base, None)))
            counts["exported"] += 1
        except WeightLoraError as error:
            assert_one_line(error)
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(
                f"folder {i} for {name}: {(folder / 'adapter_config.json').read_bytes()[:2000]}"
            ) from error
        if i % SHOWN == 0:
            capsys.readouterr()
            code = main(["check", str(folder), "--for", name])
            output = capsys.readouterr()
            assert code in (0, 1, 2)
            assert code != 2 or output.err.count("\n") == 1
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", output.out.replace("\x1b[", "") + output.err)
    tell(capsys, f"{COUNT} damaged adapters: {dict(counts)}; 0 raw tracebacks")
    assert min(counts["refused"], counts["exported"]) > COUNT / 20
