"""What each stack does with its configuration: the options it reads, and the call of PEFT that it makes with them.

Written after the sources of the versions in ``STACKS``; ``benchmarks/stacks.py`` runs the stacks' own parsers.
"""

import ast
import json

import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from trl import ModelConfig, TrlParser, get_peft_config


def _call(text, function):
    """The arguments of the one call of ``function``, and its assigned name."""
    (call,) = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    ]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def read_peft(model, text):
    return get_peft_model(model, LoraConfig(**_call(text, "LoraConfig")))


def read_trl(model, text, path):
    if "import" in text:
        return read_peft(model, text)
    path.write_text(text)
    (arguments,) = TrlParser([ModelConfig]).parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    config = get_peft_config(arguments)
    config.task_type = yaml.safe_load(text).get("lora_task_type")  # TRL trains language models alone
    return get_peft_model(model, config)


def read_axolotl(model, text):
    """``axolotl.loaders.adapter.load_lora``."""
    found = yaml.safe_load(text)
    assert found.pop("adapter") == "lora"
    if "lora_model_dir" in found:
        return PeftModel.from_pretrained(model, found.pop("lora_model_dir"), is_trainable=True)
    assert found.pop("lora_target_linear") is False
    if "lora_modules_to_save" in found:
        found["lora_modules_to_save"] = list(found["lora_modules_to_save"])
    for name in ("lora_r", "lora_alpha"):
        assert isinstance(found[name], int)
    fields = {name.removeprefix("lora_").removeprefix("peft_"): value for name, value in found.items()}
    fields["lora_alpha"], fields["lora_dropout"] = fields.pop("alpha"), fields.pop("dropout")
    return get_peft_model(model, LoraConfig(**fields))


def read_llamafactory(model, text):
    """``llamafactory.model.adapter._setup_lora_tuning``."""
    found = yaml.safe_load(text)
    assert found.pop("finetuning_type") == "lora"
    if "adapter_name_or_path" in found:
        assert found["create_new_adapter"] is False
        return PeftModel.from_pretrained(model, found["adapter_name_or_path"], is_trainable=True)
    head = found.pop("additional_target", None)
    assert isinstance(found["lora_alpha"], int)
    names = [name.strip() for name in found.pop("lora_target").split(",")]
    fields = {"target_modules": names, "modules_to_save": head and head.split(","), "r": found.pop("lora_rank")}
    return get_peft_model(model, LoraConfig(**fields, **found))


def read_swift(model, text):
    """``swift.pipelines.train.tuner``."""
    found = yaml.safe_load(text)
    assert found.pop("tuner_type") == "lora"
    if "adapters" in found:
        (folder,) = found["adapters"]
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    pattern = found.pop("target_regex", None)
    found["target_modules"] = pattern or found["target_modules"]
    return get_peft_model(model, LoraConfig(r=found.pop("lora_rank"), **found))


def read_unsloth(model, text):
    """``unsloth.FastLanguageModel.get_peft_model``, which asserts a whole ``r`` and gives the rest to PEFT."""
    fields = _call(text, "FastLanguageModel.get_peft_model")
    assert type(fields["r"]) is int
    return get_peft_model(model, LoraConfig(**fields))


def read_benchmark(model, text):
    """As run.py of PEFT's method comparison does: the folder's configuration, on the base model."""
    return get_peft_model(model, PeftConfig.from_peft_type(**json.loads(text)))


READ = {
    "peft": read_peft,
    "peft-benchmark": read_benchmark,
    "axolotl": read_axolotl,
    "llamafactory": read_llamafactory,
    "swift": read_swift,
    "unsloth": read_unsloth,
}
#: Names of a Llama's projections by the words of a stack that adapts whole types.
WORDS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "output_proj": "o_proj",
    "lora_query": "q_proj",
    "lora_key": "k_proj",
    "lora_value": "v_proj",
    "lora_projection": "o_proj",
}
MLP = ("gate_proj", "up_proj", "down_proj")


def read_types(stack, text):
    """Projections, rank and scale that torchtune or LitGPT gives to every layer."""
    found = yaml.safe_load(text)
    if stack == "torchtune":
        model = found["model"]
        kept, mlp, r = model["lora_attn_modules"], model["apply_lora_to_mlp"], model["lora_rank"]
        found = model
    else:
        kept = [word for word in WORDS if found.get(word) is True]
        mlp, r = found["lora_mlp"], found["lora_r"]
    return {*(WORDS[word] for word in kept), *(MLP if mlp else ())}, r, found["lora_alpha"] / r
