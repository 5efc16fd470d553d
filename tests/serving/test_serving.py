"""What is said of an adapter, and what is exported, against a slow account of what each runtime computes."""

import gc
import json
import random
import re
import shutil
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_adapters import ALL, COMPUTE, LAYERS, FailsError, by_patterns, everywhere, logits, pairs, site
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
)

import weightlora
from weightlora.cli import main
from weightlora.errors import DataError, OptionError, PlanError, ServingError
from weightlora.serving import READERS, reader_of
from weightlora.serving.adapter import read_base, read_files
from weightlora.serving.check import check, find_problems, needed_option
from weightlora.serving.export import export, next_step
from weightlora.serving.write import Planned, write_tensors

RUNTIMES = [reader.name for reader in READERS if reader.name != "everywhere"]


def same(found, wanted):
    """Whether both compute the same on each site, adapters of zeros aside."""
    names = {name for part in (found, wanted) for name, delta in part.items() if bool(delta.any())}
    return names <= found.keys() & wanted.keys() and all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in names)


def reads_right(runtime, folder, wanted):
    try:
        return same(COMPUTE[runtime](folder, LAYERS), wanted)
    except FailsError:
        return False


def verdict(folder, runtime, base):
    return not find_problems(read_files(folder), reader_of(runtime), read_base(base, "CAUSAL_LM"))


def is_refused(runtime, wanted):
    """Whether no layout of this adapter is read right."""
    names = {name.rpartition(".")[2] for name in wanted}
    unread = {
        "tgi": {"lm_head", "embed_tokens"},
        "lorax": {"embed_tokens"},
        "ollama": {"lm_head", "embed_tokens", "q_proj", "k_proj"},
        "everywhere": {"lm_head", "embed_tokens"},
    }
    return bool(names & unread.get(runtime, set()))


def has_more_columns_than_rows(folder):
    return any(b.shape[0] < b.shape[1] for _, b in pairs(folder).values())


@pytest.mark.sampled(10)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_verdict_is_what_the_runtime_does_and_the_export_is_right(runtime, adapter, tmp_path):
    wanted = by_patterns(adapter.folder)
    assert verdict(adapter.folder, runtime, adapter.base) == reads_right(runtime, adapter.folder, wanted)
    if is_refused(runtime, wanted) or (runtime == "ollama" and has_more_columns_than_rows(adapter.folder)):
        with pytest.raises(ServingError, match=r"merge_and_unload|--converter"):
            export(adapter.folder, runtime, tmp_path / "out")
        return
    out = export(adapter.folder, runtime, tmp_path / "out")
    assert reads_right(runtime, out, wanted)
    if runtime != "mlx":
        assert verdict(out, runtime, adapter.base)
        assert torch.allclose(logits(adapter.base, out), adapter.logits, atol=1e-5)


@pytest.mark.sampled(12)
def test_one_layout_is_right_everywhere(adapter, tmp_path):
    wanted = by_patterns(adapter.folder)
    if is_refused("everywhere", wanted):
        with pytest.raises(ServingError, match="merge_and_unload"):
            export(adapter.folder, "everywhere", tmp_path / "out")
        return
    out = export(adapter.folder, "everywhere", tmp_path / "out")
    right = {runtime for runtime in RUNTIMES if reads_right(runtime, out, wanted)}
    assert right >= {*RUNTIMES} - {"mlx", "ollama"}
    assert torch.allclose(logits(adapter.base, out), adapter.logits, atol=1e-5)


def test_each_runtime_reads_some_adapter_wrong_but_vllm(save):
    """Otherwise the exports above would prove nothing; vLLM refuses ``bias``."""
    saved = save(target_modules=ALL[:5], rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3}, lora_alpha=7.5)
    wanted = by_patterns(saved.folder)
    assert [runtime for runtime in RUNTIMES if reads_right(runtime, saved.folder, wanted)] == ["vllm"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(12))
def test_random_adapters(seed, save, tmp_path):
    lot = random.Random(seed)
    names = lot.sample(ALL, lot.randint(1, len(ALL))) if lot.random() < 0.7 else everywhere("q_proj", "v_proj")
    patterns = {
        field: {name: lot.choice(values) for name in lot.sample(names, lot.randint(0, len(names) // 2))}
        for field, values in (("rank_pattern", (1, 2, 4, 6)), ("alpha_pattern", (1, 8, 8.5)))
        if lot.random() < 0.5
    }
    saved = save(target_modules=names, use_rslora=lot.random() < 0.3, lora_alpha=lot.choice((4, 8, 0.5)), **patterns)
    wanted = by_patterns(saved.folder)
    for runtime in RUNTIMES:
        assert verdict(saved.folder, runtime, saved.base) == reads_right(runtime, saved.folder, wanted), runtime
        if not is_refused(runtime, wanted):
            assert reads_right(runtime, export(saved.folder, runtime, tmp_path / runtime), wanted), runtime


def test_an_adapter_that_is_read_right_is_copied(save, tmp_path):
    saved = save(target_modules=ALL)
    out = export(saved.folder, "sglang", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (saved.folder / name).read_bytes()


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
@pytest.mark.parametrize("alpha", [8, 6])
def test_a_scale_costs_no_precision(dtype, kept, alpha, save, tmp_path):
    """Alpha 8 of rank 4 is the scale 2, which bfloat16 multiplies exactly; 1.5 is not, and float16 may overflow."""
    saved = save(target_modules=ALL, lora_alpha=alpha, alpha_pattern={"q_proj": alpha})
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, saved.folder / "adapter_model.safetensors")
    (saved.folder / "adapter_config.json").write_text(
        json.dumps({**json.loads((saved.folder / "adapter_config.json").read_text()), "target_modules": ".*_proj"})
    )
    out = load_file(export(saved.folder, "sglang", tmp_path / "out") / "adapter_model.safetensors")
    wanted = {name: t.to(dtype).double() for name, t in tensors.items()}
    for name, t in wanted.items():
        factor = alpha / 4 if "lora_B" in name else 1.0
        assert torch.equal(out[name].double(), (t.float() * factor).double()), name
    same_type = {t.dtype for name, t in out.items() if "lora_B" in name} == {dtype}
    assert same_type == (kept or (dtype == torch.bfloat16 and alpha == 8))


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
@pytest.mark.parametrize("runtime", [reader.name for reader in READERS])
def test_what_no_layout_can_express_is_refused_with_the_way_out(fields, said, runtime, save, tmp_path, base):
    saved = save(**{"target_modules": ["q_proj"], **fields})
    with pytest.raises(ServingError, match=said) as caught:
        export(saved.folder, runtime, tmp_path / "out")
    assert "merge_and_unload" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert not verdict(saved.folder, runtime, base)


def test_an_initialisation_that_changed_the_base_is_refused(save, tmp_path):
    saved = save(target_modules=ALL)
    file = saved.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(ServingError, match="path_initial_model_for_weight_conversion"):
        export(saved.folder, "vllm", tmp_path / "out")


@pytest.mark.parametrize(("r", "option"), [(16, None), (17, "--max-lora-rank 32"), (300, "--max-lora-rank 320")])
def test_vllm_needs_a_limit_above_its_default(r, option, save):
    saved = save(target_modules=[site(0, "q_proj")], r=r)
    assert needed_option(read_files(saved.folder), reader_of("vllm")) == option
    assert needed_option(read_files(saved.folder), reader_of("tgi")) is None


def test_vllm_asks_for_the_largest_rank_in_the_configuration(save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"), r=32, rank_pattern={"v_proj": 8})
    assert needed_option(read_files(saved.folder), reader_of("vllm")) == "--max-lora-rank 32"
    out = export(saved.folder, "everywhere", tmp_path / "out")
    assert needed_option(read_files(out), reader_of("vllm")) is None


def test_padding_limits_the_gpus(save, capsys):
    """Rank 16 is 8 for each of two GPUs; on three, TGI would pad it to 24."""
    saved = save(target_modules=ALL, r=16)
    assert main(["check", str(saved.folder), "--for", "tgi"]) == 0
    assert "yes, on at most 2 GPUs" in capsys.readouterr().out


def test_a_rank_above_every_limit_is_refused(save, tmp_path):
    saved = save(target_modules=[site(0, "q_proj")], r=513)
    with pytest.raises(ServingError, match="rank 513 is above 512"):
        export(saved.folder, "vllm", tmp_path / "out")


def test_a_failed_export_leaves_what_was_there(save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"))
    out = export(saved.folder, "vllm", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="give --base"):
        export(saved.folder, "sglang", out, base=str(tmp_path / "nowhere"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_that_the_adapter_does_not_name_are_found_in_the_base(save, base):
    """Alone, an adapter of the first two layers looks complete."""
    saved = save(target_modules=[site(0, "o_proj"), site(1, "o_proj")])
    adapter, tgi = read_files(saved.folder), reader_of("tgi")
    assert find_problems(adapter, tgi) == ()
    (found,) = find_problems(adapter, tgi, read_base(base, "CAUSAL_LM"))
    assert found.text == "self_attn.o_proj is missing in layer 2 and would be dropped everywhere"


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_who_reads_one_end_of_a_model_that_ties_both(name, base, tmp_path):
    """llama.cpp and MLX have one matrix for both; an adapter of one would act on both, or stop the server."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied")
    lora = LoraConfig(r=8, target_modules=[name], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "adapter"))
    right = {runtime for runtime in RUNTIMES if verdict(tmp_path / "adapter", runtime, str(tmp_path / "tied"))}
    assert right == {"vllm", "sglang"} | ({"lorax"} if name == "lm_head" else set())
    for runtime in {*RUNTIMES} - right:
        with pytest.raises(ServingError, match="merge_and_unload"):
            export(tmp_path / "adapter", runtime, tmp_path / "out", base=str(tmp_path / "tied"))


@pytest.mark.parametrize(
    ("config", "right"),
    [
        (LlamaConfig, {"v_proj"}),
        (MistralConfig, {"v_proj"}),
        (Gemma2Config, {"q_proj", "v_proj"}),
        (Qwen3Config, set()),
    ],
)
def test_ollama_converts_adapters_of_two_architectures(config, right, tmp_path):
    """convert.go knows llama, whose queries it reorders, and gemma2; of others it says "unsupported architecture"."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = config(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=32, **heads)
    config.save_pretrained(tmp_path / "base")
    for name in ("q_proj", "v_proj"):
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=[name], task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_config(config), lora).save_pretrained(str(tmp_path / name))
        assert verdict(tmp_path / name, "ollama", str(tmp_path / "base")) == (name in right)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    alive: list[weakref.ref] = []

    def make():
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        tensor = torch.ones(3, 5)
        alive.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path / "a", {name: Planned("F32", (3, 5), make) for name in "abc"})
    assert len(alive) == 3
    assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") % 8 == 0  # readers map the numbers into memory
    assert {name: t.shape for name, t in load_file(tmp_path / "a").items()} == dict.fromkeys("abc", torch.Size([3, 5]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": "eight"}, "r='eight'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"r": True}, "r=True"),
        ({"r": 3}, "damaged"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "positive"),
        ({"peft_type": "VERA"}, "VERA"),
    ],
)
def test_a_damaged_adapter_is_named(change, said, save):
    saved = save(target_modules=ALL)
    file = saved.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(PlanError, match=said):
        read_files(saved.folder)


# -- llama.cpp's converter -------------------------------------------------------------------------------------------

#: Takes the converter's arguments, and writes what it was given instead of a GGUF file.
CONVERTER = """
import json, pathlib, sys
folder, _, base, _, target, _, kind = sys.argv[1:]
config = json.loads((pathlib.Path(base) / "config.json").read_text())
adapter = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
pathlib.Path(target).write_text(json.dumps([config["architectures"], config["num_hidden_layers"], adapter["r"], kind]))
"""


@pytest.fixture
def converter(tmp_path):
    path = tmp_path / "scripts" / "convert_lora_to_gguf.py"
    path.parent.mkdir()
    path.write_text(CONVERTER)
    return path


@pytest.mark.parametrize("runtime", ["llama.cpp", "ollama", "everywhere"])
def test_the_converter_gets_the_export_and_the_base(runtime, converter, save, tmp_path):
    saved = save(target_modules=everywhere("q_proj"), use_rslora=True)
    out = export(saved.folder, runtime, tmp_path / "out", converter=converter)
    r = 8 if runtime == "everywhere" else 4  # TGI pads
    assert json.loads((out / "adapter.gguf").read_text()) == [["LlamaForCausalLM"], LAYERS, r, "f32"]
    assert reads_right("llama.cpp", out, by_patterns(saved.folder))


@pytest.mark.slow
def test_the_converter_gets_the_configuration_of_an_embedded_model(converter, save, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(save(target_modules=[site(0, "q_proj")]).folder, folder)
    name = f"base_model.model.{site(0, 'q_proj')}.lora_{{}}.weight"
    matrices = {name.format("A"): torch.ones(4, 576), name.format("B"): torch.ones(576, 4)}  # SmolLM2's features
    save_file(matrices, folder / "adapter_model.safetensors")
    words = [str(folder), "--for", "llama.cpp", "--output_dir", str(tmp_path / "out"), "--converter", str(converter)]
    assert main(["export", *words, "--base", "embedded/smollm2"]) == 0
    assert json.loads((tmp_path / "out" / "adapter.gguf").read_text())[:2] == [["LlamaForCausalLM"], 30]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; print('first', file=sys.stderr); sys.exit('no such architecture')", "no such architecture"),
        ("print('does nothing')", "does nothing"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_converter_that_fails_is_one_line_and_leaves_nothing(script, said, converter, save, tmp_path, capsys):
    saved = save(target_modules=ALL)
    converter.write_text(script)
    capsys.readouterr()
    words = [
        str(saved.folder),
        "--for",
        "llama.cpp",
        "--output_dir",
        str(tmp_path / "out"),
        "--converter",
        str(converter),
    ]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert f"convert_lora_to_gguf.py fails: {said}" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize(("runtime", "name", "said"), [("vllm", "", "does not read"), ("llama.cpp", "no", "no file")])
def test_a_wrong_converter_is_refused(runtime, name, said, converter, save, tmp_path):
    saved = save(target_modules=ALL)
    with pytest.raises(OptionError, match=said):
        export(saved.folder, runtime, tmp_path / "out", converter=f"{converter}{name}")
    assert not (tmp_path / "out").exists()


# -- the commands ----------------------------------------------------------------------------------------------------


def test_check_and_export_on_the_command_line(save, tmp_path, capsys):
    saved = save(target_modules=everywhere("v_proj"), r=32)
    assert main(["check", str(saved.folder), "--for", "vllm"]) == 0
    assert capsys.readouterr().out.split() == ["vllm", "yes,", "with", "--max-lora-rank", "32"]
    assert main(["check", str(saved.folder), "--for", "sglang"]) == 1
    said = capsys.readouterr().out
    assert "v_proj without q_proj in layers 0, 1, 2" in said
    assert f"weightlora export {saved.folder} --for sglang" in said
    assert main(["export", str(saved.folder), "--for", "sglang", "--output_dir", str(tmp_path / "out")]) == 0
    assert main(["check", str(tmp_path / "out"), "--for", "sglang"]) == 0
    capsys.readouterr()
    assert main(["check", str(saved.folder), "--for", "all"]) == 1
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "} == {
        *RUNTIMES,
        "everywhere",
    }


def test_the_folder_of_a_run_stands_for_its_adapter(save, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(save(target_modules=everywhere("v_proj")).folder, run / "adapter")
    (run / "config.yaml").write_text("learning_rate: 0.01\n")
    # What pushes while training leave there is older than the adapter.
    shutil.copytree(save(target_modules=everywhere("q_proj")).folder, run, dirs_exist_ok=True)
    assert main(["check", str(run), "--for", "sglang"]) == 1
    said = capsys.readouterr().out
    assert "v_proj without q_proj" in said
    assert f"weightlora export {run} --for sglang" in said
    assert main(["export", str(run), "--for", "vllm", "--output_dir", str(tmp_path / "out")]) == 0
    weights = [folder / "adapter_model.safetensors" for folder in (run / "adapter", tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


NEXT = {
    "vllm": "vllm serve {base} --enable-lora --lora-modules adapter={out} --max-lora-rank 32",
    "sglang": "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths adapter={out}",
    "tgi": "text-generation-launcher --model-id {base} --lora-adapters adapter={out}",
    "lorax": "lorax-launcher --model-id {base} --adapter-id {out} --adapter-source local",
    "llama.cpp": "llama-server -m base.gguf --lora {out}/adapter.gguf",
    "ollama": "write the lines FROM base.gguf and ADAPTER {out}/adapter.gguf into a Modelfile, then: "
    "ollama create NAME -f Modelfile",
    "mlx": "mlx_lm.server --model {base} --adapter-path {out}",
    "everywhere": "weightlora check {out} --for all",
}


@pytest.mark.parametrize("runtime", NEXT)
def test_an_export_ends_with_where_it_is_how_long_it_took_and_the_next_command(
    runtime, converter, save, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    saved, out = save(target_modules=everywhere("v_proj"), r=32), tmp_path / "out"
    gguf = ["--converter", str(converter)] if runtime in ("llama.cpp", "ollama", "everywhere") else []
    capsys.readouterr()
    assert main(["export", str(saved.folder), "--for", runtime, "--output_dir", "out", *gguf]) == 0
    wrote, then = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"wrote out for .+ \([0-9.]+ s\)", wrote)
    assert then == "next: " + NEXT[runtime].format(base=saved.base, out=out)


def test_ollama_finds_the_weights_in_a_folder_under_its_own_name(save, tmp_path):
    out = export(save(target_modules=everywhere("v_proj")).folder, "ollama", tmp_path / "my out")
    assert [file.name for file in out.glob("model*.safetensors")] == ["model.safetensors"]  # ollama create's pattern
    assert (out / "model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()
    then = next_step(reader_of("ollama"), out, "", gguf=False)
    assert then.startswith(f"next: write the lines FROM base.gguf and ADAPTER {out} into")  # a Modelfile knows no '


def test_without_a_converter_llama_cpp_has_nothing_to_read(save, tmp_path, capsys):
    saved = save(target_modules=everywhere("v_proj"))
    capsys.readouterr()
    assert main(["export", str(saved.folder), "--for", "llama.cpp", "--output_dir", str(tmp_path / "out")]) == 0
    _, then = capsys.readouterr().out.splitlines()
    assert then.startswith("no GGUF file was written")
    assert "--converter llama.cpp/convert_lora_to_gguf.py (git clone" in then


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--for", "vlm"], "closest: 'vllm'"),
        (["--for", "tgi", "--base", "nowhere/at/all"], "cannot read the base model"),
    ],
)
def test_a_mistake_is_one_line_and_2(words, said, save, capsys):
    saved = save(target_modules=ALL)
    capsys.readouterr()
    assert main(["check", str(saved.folder), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_public_function_is_the_same():
    assert (weightlora.export, weightlora.check) == (export, check)
    with pytest.raises(OptionError, match="closest: 'mlx'"):
        weightlora.export("anywhere", "mlxx", "out")
