"""What `check` and `export` say where the base model does not fit the adapter, is served alone, or is an encoder."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_adapters import base_model, everywhere
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
)

from weightlora.cli import main
from weightlora.serving import READERS
from weightlora.tasks.embedded import minilm

SMALL = {"num_hidden_layers": 1, "vocab_size": 64}


def said_of(folder, capsys, *words):
    """The exit code, and the lines that `check` prints."""
    capsys.readouterr()
    code = main(["check", str(folder), *words])
    return code, capsys.readouterr().out.splitlines()


def refused(folder, out, capsys, *words):
    """The one line with which `export` refuses."""
    capsys.readouterr()
    assert main(["export", str(folder), "--output_dir", str(out), *words]) == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


# -- another base model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wider(base, tmp_path_factory):
    """A base model with the same names and twice the features."""
    folder = tmp_path_factory.mktemp("wider")
    config = LlamaConfig.from_pretrained(base, hidden_size=64, intermediate_size=96)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "tgi", "llama.cpp", "mlx", "everywhere"])
def test_an_adapter_of_fewer_features_is_refused(runtime, save, wider, tmp_path, capsys):
    saved = save(target_modules=everywhere("q_proj", "v_proj"), r=8)
    code, lines = said_of(saved.folder, capsys, "--for", runtime, "--base", wider)
    assert (code, lines[0].split()) == (1, [runtime, "no"])
    (reason,) = [line for line in lines if "has the shape" in line]
    tensor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert f"{tensor} has the shape (8, 32), and this base model needs (8, 64)" in reason
    assert "--base" in reason
    line = refused(saved.folder, tmp_path / "out", capsys, "--for", runtime, "--base", wider)
    assert f"{tensor} has the shape (8, 32)" in line


def resized(base, folder, **fields):
    """An adapter that was trained after 16 words were added to the 64."""
    lora = LoraConfig(r=8, task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    model = base_model(base)
    model.resize_token_embeddings(80)
    get_peft_model(model, lora).save_pretrained(str(folder), save_embedding_layers=True)
    return folder


@pytest.mark.parametrize(
    ("targets", "tensor", "found", "needed"),
    [
        (["v_proj"], "base_model.model.lm_head.weight", "(80, 32)", "(64, 32)"),
        (["v_proj", "embed_tokens"], "base_model.model.model.embed_tokens.lora_embedding_A", "(8, 80)", "(8, 64)"),
    ],
)
def test_resized_embeddings_are_refused(targets, tensor, found, needed, base, tmp_path, capsys):
    folder = resized(base, tmp_path / "adapter", target_modules=targets)
    code, lines = said_of(folder, capsys, "--for", "vllm", "--base", base)
    assert code == 1
    (reason,) = [line for line in lines if "has the shape" in line]
    assert f"{tensor} has the shape {found}, and this base model needs {needed}" in reason
    assert "embeddings resized" in reason
    assert f"{found}" in refused(folder, tmp_path / "out", capsys, "--for", "vllm", "--base", base)


def test_with_the_resized_base_model_the_shapes_fit(base, tmp_path, capsys):
    """The control: the same adapter, and the base model that it belongs to."""
    model = base_model(base)
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path / "base")
    folder = resized(base, tmp_path / "adapter", target_modules=["v_proj", "embed_tokens"])
    _, lines = said_of(folder, capsys, "--for", "vllm", "--base", str(tmp_path / "base"))
    assert not [line for line in lines if "has the shape" in line]


def test_the_base_model_that_the_adapter_names_is_compared_too(save, wider, tmp_path, capsys):
    saved = save(target_modules=[everywhere("v_proj")[0]], r=8)
    file = saved.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": wider}))
    assert "has the shape" in refused(saved.folder, tmp_path / "out", capsys, "--for", "tgi")


# -- model classes of vLLM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "targets", "verdict"),
    [
        (GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64), ["c_attn"], "no"),
        (MambaConfig(hidden_size=16, **SMALL), ["in_proj"], "no"),
        (Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, n_groups=1, **SMALL), ["in_proj"], "no"),
        (BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=64), ["query_key_value"], "no"),
        (
            OPTConfig(hidden_size=16, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16, **SMALL),
            ["v_proj"],
            "yes",
        ),
        (
            Qwen3Config(hidden_size=16, intermediate_size=32, head_dim=8, num_attention_heads=2, **SMALL),
            ["v_proj"],
            "yes",
        ),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_vllm_serves_some_classes_without_adapters(config, targets, verdict, tmp_path, capsys):
    config.save_pretrained(tmp_path / "base")
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path / "adapter")
    )
    words = ["--for", "vllm", "--base", str(tmp_path / "base")]
    code, lines = said_of(tmp_path / "adapter", capsys, *words)
    assert (code, lines[0].split()) == (int(verdict == "no"), ["vllm", verdict])
    if verdict == "no":
        assert f"base models of class {type(model).__name__} are served without adapters" in lines[1]
        assert type(model).__name__ in refused(tmp_path / "adapter", tmp_path / "out", capsys, *words)


def test_without_the_base_model_vllms_verdict_is_not_known(save, tmp_path, capsys):
    saved = save(target_modules=everywhere("v_proj"), r=8)
    file = saved.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "some/where"}))
    code, lines = said_of(saved.folder, capsys, "--for", "vllm")
    assert (code, lines[0].split()) == (1, ["vllm", "not", "known"])
    assert "give it with --base" in lines[1]
    code, lines = said_of(saved.folder, capsys, "--for", "llama.cpp")
    assert (code, lines[0].split()) == (0, ["llama.cpp", "yes"])
    assert main(["export", str(saved.folder), "--for", "vllm", "--output_dir", str(tmp_path / "out")]) == 0  # as ever


# -- adapters of MiniLM as a classifier: a clear verdict for each runtime --------------------------------------------

TRAINING = {
    "task": "rotten_tomatoes",
    "max_train_samples": 32,
    "max_eval_samples": 8,
    "max_seq_length": 16,
    "max_steps": 2,
    "adapters": 0.5,
    "steps": 2,
    "rule": "first_order",
    "rule_options": "head_steps=0",
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
OTHERS = [reader.name for reader in READERS if reader.name != "vllm"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "run"
    assert main(["train", *(f"--{name}={value}" for name, value in TRAINING.items()), f"--output_dir={folder}"]) == 0
    return folder / "adapter"


@torch.no_grad()
def logits(folder):
    model = AutoModelForSequenceClassification.from_pretrained(str(minilm()), num_labels=2)
    return PeftModel.from_pretrained(model, folder).eval()(input_ids=torch.tensor([[101, 2204, 3185, 102]])).logits


def with_config(adapter, folder, **fields):
    shutil.copytree(adapter, folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return folder


def test_vllm_reads_a_classifier_with_its_head(adapter, tmp_path, capsys):
    assert main(["check", str(adapter), "--for", "vllm"]) == 0
    assert capsys.readouterr().out.split() == ["vllm", "yes"]
    assert main(["export", str(adapter), "--for", "vllm", "--output_dir", str(tmp_path / "served")]) == 0
    assert logits(tmp_path / "served").equal(logits(adapter))


@pytest.mark.parametrize("runtime", OTHERS)
def test_the_others_get_one_reason_that_names_the_task(runtime, adapter, tmp_path, capsys):
    assert main(["check", str(adapter), "--for", runtime]) == 1
    verdict, *reasons = capsys.readouterr().out.splitlines()
    assert verdict.split() == [runtime, "no"]
    (reason,) = reasons
    assert "only known to read adapters of CAUSAL_LM" in reason
    assert "task_type='SEQ_CLS'" in reason
    assert main(["export", str(adapter), "--for", runtime, "--output_dir", str(tmp_path / "served")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("task_type='SEQ_CLS'", line)
    assert not (tmp_path / "served").exists()


def test_the_task_type_decides_and_without_one_the_tensors_do(adapter, tmp_path, capsys):
    """The controls: what is said is read from the files, and is not the same for all adapters of encoders."""
    for task in ("TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS"):
        folder = with_config(adapter, tmp_path / task, task_type=task)
        assert main(["check", str(folder), "--for", "vllm"]) == 1
        assert f"task_type='{task}'" in capsys.readouterr().out
    bare = with_config(adapter, tmp_path / "none", task_type=None)
    assert main(["check", str(bare), "--for", "llama.cpp"]) == 1
    assert "classifier.bias among them" in capsys.readouterr().out
