"""PEFT's own ``PeftCommonTester`` on planned adapters: nothing fails that does not fail with plain LoRA.

It is in PEFT's repository and not in its wheel, so nothing is fetched: ``PEFT_TESTS`` names the folder ``tests`` of a
checkout of the installed version. Models are made from their config classes.
"""

import importlib
import inspect
import os
import sys
import types
import warnings
from collections import Counter
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan

TESTS = os.environ.get("PEFT_TESTS", "")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: The loader, the config and PEFT's task.
MODELS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**SMALL, **TOKENS), "CAUSAL_LM"),
    "gpt2": (AutoModelForCausalLM, GPT2Config(**GPT2, **TOKENS), "CAUSAL_LM"),
    "bert": (AutoModelForSequenceClassification, BertConfig(**SMALL, **TOKENS), "SEQ_CLS"),
    "t5": (AutoModelForSeq2SeqLM, T5Config(**T5, decoder_start_token_id=0), "SEQ_2_SEQ_LM"),
}
IDS, MASK = torch.tensor([[1, 1, 1], [1, 2, 1]]), torch.tensor([[1, 1, 1], [1, 0, 1]])


@pytest.fixture(scope="module")
def common():
    """PEFT's module with the mixin."""
    if not (Path(TESTS) / "testing_common.py").is_file():
        pytest.skip("PEFT's own tests are not here: PEFT_TESTS names no folder with testing_common.py")
    package = types.ModuleType("peft_tests")
    package.__path__ = [TESTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peft_tests", package)
        if find_spec("diffusers") is None:  # only its pipeline's type is looked at
            stand_in = types.ModuleType("diffusers")
            stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
            patch.setitem(sys.modules, "diffusers", stand_in)
        yield importlib.import_module("peft_tests.testing_common")


def planned(model, task_type, *, uneven):
    """A plan on two thirds of the sites; with ``uneven`` ranks and alphas differ, which needs patterns."""
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.05, task_type=task_type)  # r as a test of PEFT's expects
    sites = find_sites(model, lora).sites
    kept = [site.name for number, site in enumerate(sites) if number % 3]
    ranks = {name: 2 + number % 2 for number, name in enumerate(kept)} if uneven else None
    return make_plan(sites, lora, kept, ranks=ranks, rule="random", base_model=None)


def config_class(plan):
    """A class that PEFT's tests take for ``LoraConfig``, and whose objects are the plan's."""

    class Same(type):
        def __eq__(cls, other):
            return other is LoraConfig or other is cls

        def __hash__(cls):
            return hash(LoraConfig)

        def __call__(cls, **given):
            if "layers_to_transform" in given:  # PEFT skips a test of what a config does not have
                raise TypeError("the plan has chosen the layers")
            return plan.to_lora_config(**given)

    return Same("PlannedConfig", (LoraConfig,), {})


def attaching(plan):
    """``get_peft_model`` by ``plan.attach`` where the plan's own adapter is wanted."""

    def attached(model, config, adapter_name="default", **more):
        own = plan.to_lora_config()
        changed = {f.name for f in fields(LoraConfig) if getattr(config, f.name) != getattr(own, f.name)}
        others = {"r", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
        if adapter_name != "default" or more or changed & others:
            return peft.get_peft_model(model, config, adapter_name, **more)
        overrides = {name: getattr(config, name) for name in changed if name not in ("inference_mode", "lora_alpha")}
        return plan.attach(model, **overrides)

    return attached


def mixin(common, loader, *, seq2seq):
    class Tester(common.PeftCommonTester):
        transformers_class = loader

        def prepare_inputs_for_testing(self):
            more = {"decoder_input_ids": IDS} if seq2seq else {}
            return {"input_ids": IDS, "attention_mask": MASK, **more}

    return Tester()


def outcome(method, *arguments):
    """How a method of the mixin ends, and with what."""
    torch.manual_seed(0)
    own = {"raises_err": False, "test_name": ""}
    asked = inspect.signature(method).parameters
    given = dict(zip(("model_id", "config_cls", "config_kwargs"), arguments, strict=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method(**given, **{name: value for name, value in own.items() if name in asked})
    except pytest.skip.Exception:
        return "skipped", ""
    except (Exception, pytest.fail.Exception) as error:
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "passed", ""


@pytest.mark.parametrize("uneven", [False, True], ids=["equal ranks", "unequal ranks"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_fails_that_plain_lora_passes(name, uneven, common, tmp_path, monkeypatch):
    loader, config, task_type = MODELS[name]
    torch.manual_seed(0)
    model = loader.from_config(config)
    model.save_pretrained(tmp_path / name)
    plan = planned(model, task_type, uneven=uneven)
    own = plan.to_lora_config()
    same = {"target_modules": list(own.target_modules), "r": own.r, "lora_alpha": own.lora_alpha}
    same |= {"rank_pattern": own.rank_pattern, "alpha_pattern": own.alpha_pattern}
    runs = mixin(common, loader, seq2seq=name == "t5")
    methods = [
        method
        for label, method in inspect.getmembers(runs, inspect.ismethod)
        if label.startswith("_test_") and "config_cls" in inspect.signature(method).parameters
    ]
    counts, ours = Counter(), []
    for method in methods:
        for start in ({}, {"init_lora_weights": False}):
            kwargs = {"task_type": task_type, "lora_dropout": 0.05, **start}
            plain = outcome(method, str(tmp_path / name), LoraConfig, {**kwargs, **same})
            for road, get in (("config", peft.get_peft_model), ("attach", attaching(plan))):
                with monkeypatch.context() as patch:
                    patch.setattr(common, "get_peft_model", get)
                    found = outcome(method, str(tmp_path / name), config_class(plan), dict(kwargs))
                counts[plain[0], found[0]] += 1
                if found[0] == "failed" and plain[0] != "failed":
                    ours.append((method.__name__, road, start, plain, found))
    print(f"{name}, {len(methods)} methods: " + ", ".join(f"{a}/{b} {n}" for (a, b), n in sorted(counts.items())))  # noqa: T201
    assert not ours, "\n".join(map(str, ours))
    assert counts["passed", "passed"]
