"""What training stacks make of an emitted plan: each stack's own parser reads it, and its own code adds the adapters.

    python benchmarks/stacks.py [--python PATH ...]

Prints one line per stack: its version, whether its parser accepts the output, and whether the adapters in a small Llama
are the plan's, for each of four plans. A stack that is not installed here is looked for in the interpreters of
``--python``: most stacks need older libraries than ours. This file runs there with ``--read``, without weightlora.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

#: Name on the package index, where it differs from ours.
DISTRIBUTIONS = {"swift": "ms-swift"}
LAYERS = 4
#: Sizes of the small Llama, in transformers' words.
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": 1000,
}
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def site(layer: int, name: str) -> str:
    """The name of a projection in transformers' Llama."""
    return f"model.layers.{layer}.{'mlp' if name in MLP else 'self_attn'}.{name}"


def plans() -> dict[str, Any]:
    """A plan of each kind by its name."""
    from weightlora import AdapterPlan
    from weightlora.model.sites import Site
    from weightlora.plan.plan import PlannedSite

    widths = {"down_proj": (24, 16), "gate_proj": (16, 24), "up_proj": (16, 24), "k_proj": (16, 8), "v_proj": (16, 8)}
    names = sorted(site(layer, name) for layer in range(LAYERS) for name in (*ATTENTION, *MLP))

    def plan(ranks: dict[str, int], alphas: dict[str, float]) -> Any:
        entries = (
            PlannedSite(
                Site(name, *widths.get(name.split(".")[-1], (16, 16))),
                *(8, 16),
                r=ranks.get(name, 0),
                alpha=alphas.get(name, 16),
                score=1.0,
            )
            for name in names
        )
        return AdapterPlan(tuple(entries), lora={"task_type": "CAUSAL_LM"})

    some = [site(1, "v_proj"), site(1, "down_proj"), site(3, "q_proj"), site(3, "v_proj"), site(2, "o_proj")]
    whole = [name for name in names if name.endswith(("v_proj", "o_proj", *MLP))]
    return {
        "whole types": plan(dict.fromkeys(whole, 4), {}),
        "one rank": plan(dict.fromkeys(some, 8), {}),
        "2 of 28": plan(dict.fromkeys(some[:2], 8), {}),
        "unequal": plan(dict(zip(some, (2, 4, 8, 2, 4), strict=True)), dict(zip(some, (16, 3, 16, 3, 8), strict=True))),
    }


# -- readers: run in an interpreter that has the stack, without weightlora ---------------------------------------------


def llama() -> Any:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def peft_adapters(model: Any) -> dict[str, tuple[int, float]]:
    """Rank and scale of PEFT's adapters by the name of their layer."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    found = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    assert all(layer.lora_A["default"].weight.requires_grad for layer in found.values()), "an adapter is frozen"
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in found.items()}


def call_of(file: Path, function: str) -> dict[str, Any]:
    """The arguments of the one call of ``function`` in a file of Python."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    (call,) = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def read_peft(file: Path) -> dict[str, tuple[int, float]]:
    """``get_peft_model``."""
    from peft import LoraConfig, get_peft_model

    return peft_adapters(get_peft_model(llama(), LoraConfig(**call_of(file, "LoraConfig"))))


def read_trl(file: Path) -> dict[str, tuple[int, float]]:
    """``TrlParser`` and ``get_peft_config``, or PEFT where the output is Python."""
    from peft import get_peft_model
    from trl import ModelConfig, TrlParser, get_peft_config

    if file.suffix == ".py":
        return read_peft(file)
    (arguments,) = TrlParser([ModelConfig]).parse_args_and_config(["--config", str(file)], fail_with_unknown_args=True)
    return peft_adapters(get_peft_model(llama(), get_peft_config(arguments)))


def read_axolotl(file: Path) -> dict[str, tuple[int, float]]:
    """``AxolotlInputConfig`` and ``load_adapter``."""
    from axolotl.loaders.adapter import load_adapter
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    needed = {"base_model": "x", "micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
    needed["datasets"] = [{"path": "x", "type": "alpaca"}]
    options = {**needed, **yaml.safe_load(file.read_text(encoding="utf-8"))}
    checked = DictDefault(AxolotlInputConfig(**options).model_dump(exclude_none=True))
    model, _ = load_adapter(llama(), checked, checked.adapter)
    return peft_adapters(model)


def read_llamafactory(file: Path) -> dict[str, tuple[int, float]]:
    """``get_train_args`` and ``init_adapter``."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter

    with tempfile.TemporaryDirectory() as out:
        needed = {"model_name_or_path": "x", "stage": "sft", "do_train": True, "dataset": "x", "template": "default"}
        needed |= {"output_dir": out, "use_cpu": True, "report_to": "none"}
        options = {**needed, **yaml.safe_load(file.read_text(encoding="utf-8"))}
        model_arguments, _, _, tuning, _ = get_train_args(options)
    model = llama()
    return peft_adapters(init_adapter(model.config, model, model_arguments, tuning, True))


def read_swift(file: Path) -> dict[str, tuple[int, float]]:
    """``parse_yaml_args``, ``SftArguments`` and ``TunerMixin.prepare_model``."""
    from swift.arguments import SftArguments
    from swift.cli.main import parse_yaml_args
    from swift.pipelines.train.tuner import TunerMixin
    from swift.utils import parse_args

    with tempfile.TemporaryDirectory() as folder:
        model = llama()
        model.save_pretrained(folder)
        words = [str(file), "--model", folder, "--model_type", "llama", "--template", "llama3", "--dataset", "x"]
        words += [
            "--output_dir",
            f"{folder}/out",
            "--torch_dtype",
            "float32",
            "--report_to",
            "none",
            "--use_cpu",
            "true",
        ]
        parse_yaml_args(words)
        arguments, left = parse_args(SftArguments, words)
        assert not left, f"unknown options {left}"
        return peft_adapters(TunerMixin.prepare_model(arguments, model))


def read_unsloth(file: Path) -> dict[str, tuple[int, float]]:
    """The signature of the GPU's ``get_peft_model``, read from its source: without a GPU, Unsloth runs other code."""
    from peft import LoraConfig, get_peft_model

    spec = find_spec("unsloth")
    assert spec is not None
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "models" / "llama.py").read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    (function,) = [node for node in functions if node.name == "get_peft_model"]
    own = {argument.arg for argument in function.args.args}
    assert function.args.kwarg, "it takes no further arguments"
    fields = call_of(file, "FastLanguageModel.get_peft_model")
    unknown = set(fields) - own - set(inspect.signature(LoraConfig).parameters)
    assert not unknown, f"unknown arguments {unknown}"
    return peft_adapters(get_peft_model(llama(), LoraConfig(**fields)))


def read_torchtune(file: Path) -> dict[str, tuple[int, float]]:
    """``lora_llama3``, by ``instantiate`` from the YAML."""
    from omegaconf import OmegaConf
    from torchtune.config import instantiate
    from torchtune.modules.peft import LoRALinear

    config: Any = OmegaConf.load(file)
    sizes = {"vocab_size": 1000, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16}
    component = {"_component_": "torchtune.models.llama3._component_builders.lora_llama3", "intermediate_dim": 24}
    model = instantiate(OmegaConf.merge(component, sizes, {"max_seq_len": 16}, config.model))
    words = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    found = [(name.split("."), layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    return {
        site(int(parts[1]), words.get(parts[-1], parts[-1])): (layer.rank, layer.alpha / layer.rank)
        for parts, layer in found
    }


def read_litgpt(file: Path) -> dict[str, tuple[int, float]]:
    """``litgpt finetune_lora``'s own parser of arguments, and its model."""
    from jsonargparse import ArgumentParser
    from litgpt.finetune.lora import setup
    from litgpt.lora import GPT, Config, LoRALinear, LoRAQKVLinear

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(setup)
    options = parser.parse_args(["--config", str(file), "--checkpoint_dir", "x"])
    own = {name: value for name, value in options.as_dict().items() if name.startswith("lora_")}
    config = Config(
        n_layer=LAYERS,
        n_embd=16,
        n_head=4,
        n_query_groups=2,
        padded_vocab_size=1000,
        mlp_class_name="LLaMAMLP",
        intermediate_size=24,
        bias=False,
        **own,
    )
    words = {"proj": "down_proj", "fc_1": "gate_proj", "fc_2": "up_proj"}
    found: dict[str, tuple[int, float]] = {}
    for name, layer in GPT(config).named_modules():
        parts = name.split(".")
        if isinstance(layer, LoRAQKVLinear):
            parts_of = [ATTENTION[i] for i, used in enumerate(layer.enable_lora) if used]
        elif isinstance(layer, LoRALinear) and layer.r and parts[-1] != "lm_head":
            parts_of = ["o_proj" if parts[-2] == "attn" else words[parts[-1]]]
        else:
            continue
        found |= {site(int(parts[2]), part): (layer.r, layer.scaling) for part in parts_of}
    return found


READERS: dict[str, Callable[[Path], dict[str, tuple[int, float]]]] = {
    "peft": read_peft,
    "trl": read_trl,
    "axolotl": read_axolotl,
    "llamafactory": read_llamafactory,
    "swift": read_swift,
    "unsloth": read_unsloth,
    "torchtune": read_torchtune,
    "litgpt": read_litgpt,
}


def read_all(stack: str, files: Iterable[str]) -> dict[str, Any]:
    """What ``stack`` makes of each file: the adapters, or why it failed."""
    results: dict[str, Any] = {"version": version(DISTRIBUTIONS.get(stack, stack))}
    for file in files:
        try:
            results[file] = READERS[stack](Path(file))
        except Exception as error:  # whatever a parser raises is its verdict
            results[file] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return results


# -- the table ---------------------------------------------------------------------------------------------------------


def has(python: str, stack: str) -> bool:
    """Whether an interpreter has the stack."""
    if python == sys.executable:
        try:
            return bool(version(DISTRIBUTIONS.get(stack, stack)))
        except PackageNotFoundError:
            return False
    code = f"from importlib.metadata import version; version({DISTRIBUTIONS.get(stack, stack)!r})"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def line(stack: str, title: str, pythons: list[str]) -> str:
    """Emit the plans for one stack, let it read them, and say what came of it."""
    from weightlora.errors import StackError
    from weightlora.stacks.emit import emit

    python = next((python for python in pythons if has(python, stack)), None)
    if python is None:
        return f"{title}: skipped, {DISTRIBUTIONS.get(stack, stack)} is not installed in {', '.join(pythons)}"
    own, refused = plans(), {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str] = {}
        for name, plan in own.items():
            output = Path(folder) / name.replace(" ", "-")
            try:
                emit(plan, stack, output)
            except StackError as error:
                refused[name] = str(error)
                continue
            files[name] = next(str(path) for path in output.iterdir() if path.is_file())
        with_adapter = {name for name, file in files.items() if (Path(file).parent / "adapter").is_dir()}
        words = [python, __file__, "--read", stack, *files.values()]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=400)
        if done.returncode:
            return f"{title}: failed to start: {done.stderr.strip().splitlines()[-1]}"
        results = json.loads(done.stdout.splitlines()[-1])
    texts: list[str] = []
    for name, plan in own.items():
        if name in refused:
            texts.append(f"{name}: refused by emit")
            continue
        found, kind = results[files[name]], "adapter directory" if name in with_adapter else "options"
        if isinstance(found, str):
            texts.append(f"{name}: {kind}, NOT accepted ({found})")
            continue
        planned = {entry.site.name: (entry.r, entry.alpha / entry.r) for entry in plan.entries if entry.r > 0}
        same = found.keys() == planned.keys() and all(
            found[n][0] == r and math.isclose(found[n][1], scale) for n, (r, scale) in planned.items()
        )
        texts.append(f"{name}: {kind}, accepted, {len(found)} adapters, {'the plan' if same else 'NOT the plan'}")
    return f"{title} {results['version']}: {'; '.join(texts)}"


def main() -> None:
    """Print the table, or run one stack's reader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", default=[], help="an interpreter that has other stacks")
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_all(arguments.read, arguments.files)))
        return
    from weightlora.stacks import STACKS

    for entry in STACKS:
        print(line(entry.name, entry.title, [sys.executable, *arguments.python]), flush=True)


if __name__ == "__main__":
    main()
