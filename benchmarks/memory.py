"""How well ``weightlora estimate`` knows the peak of a training step: estimated against counted, ten configurations.

    python benchmarks/memory.py            # counts all ten on the CPU and prints Markdown

The counted peak is that of torch's CPU allocator during the third to fifth step (forward, backward, optimizer), with
the weights, as its profiler records every allocation. The estimate sees a config and no weights. Both use one thread.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from weightlora.cost.empty_model import quantise
from weightlora.cost.memory import Setting, count_step
from weightlora.model.checkpointing import remove_input_hooks
from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan

_SIZES = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
_SIZES |= {"num_attention_heads": 8}
_BART = {"vocab_size": 8000, "d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 768}
_BART |= {"decoder_ffn_dim": 768, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
_DEBERTA = {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 64, "position_biased_input": False}
_DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
_MOE = {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
#: Task type and small config of each architecture.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "DeBERTaV3": ("SEQ_CLS", lambda: transformers.DebertaV2Config(**_SIZES, **_DEBERTA)),
    "BART": ("SEQ_2_SEQ_LM", lambda: transformers.BartConfig(**_BART)),
    "Llama": ("CAUSAL_LM", lambda: transformers.LlamaConfig(**_SIZES)),
    "Qwen3": ("CAUSAL_LM", lambda: transformers.Qwen3Config(**_SIZES, num_key_value_heads=4, head_dim=32)),
    "Qwen3-MoE": ("CAUSAL_LM", lambda: transformers.Qwen3MoeConfig(**_SIZES, **_MOE, head_dim=32)),
}
LOADERS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Configuration:
    """A model and how it is trained."""

    model: str
    method: str = "LoRA"
    """``full``, ``LoRA``, or a share of the sites and where they are: ``1/4 top``; ``+`` expands the plan."""
    setting: Setting = field(default_factory=partial(Setting, rows=8, device="cpu"))
    dtype: torch.dtype = torch.float32
    bits: str = ""
    """``4``, or ``4+`` with double quantisation."""
    length: int = 128
    """Tokens of a row."""

    def __str__(self) -> str:
        words = [
            self.method,
            f"{self.setting.rows}x{self.length}",
            self.setting.optim,
            str(self.dtype).removeprefix("torch."),
        ]
        words += [f"{self.bits} bit"] if self.bits else []
        return ", ".join([*words, *(["checkpointing"] if self.setting.gradient_checkpointing else [])])


def _trained(optim: str = "adamw_torch", *, rows: int = 8, checkpointing: bool = False) -> Setting:
    return Setting(rows=rows, optim=optim, gradient_checkpointing=checkpointing, device="cpu")


TEN = (
    Configuration("DeBERTaV3"),
    Configuration("DeBERTaV3", "full", _trained(rows=1), length=16),  # the optimizer's step is the peak
    Configuration("DeBERTaV3", "1/4 bottom", _trained("adamw_torch_fused", checkpointing=True)),
    Configuration("BART", "LoRA", _trained("adafactor")),
    Configuration("BART", "full", _trained("sgd", checkpointing=True)),
    Configuration("Llama", "LoRA", _trained("adamw_torch_fused"), torch.bfloat16),
    Configuration("Qwen3", "1/2 top"),
    Configuration("Qwen3", "LoRA", _trained(), bits="4"),
    Configuration("Qwen3", "1/2 bottom +", _trained(checkpointing=True), torch.bfloat16, bits="4+"),
    Configuration("Qwen3-MoE", "LoRA", _trained("adafactor"), torch.bfloat16),
)


def main() -> None:
    """Count all ten and print the table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print("| model | training | counted MB | estimated MB | error | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for configuration in TEN:
        real = counted(configuration)
        start = time.perf_counter()
        guess = estimated(configuration)
        seconds = time.perf_counter() - start
        numbers = f"{real / 1e6:,.1f} | {guess / 1e6:,.1f} | {100 * (guess / real - 1):+.2f} % | {seconds:.1f}"
        print(f"| {configuration.model} | {configuration} | {numbers} |", flush=True)


def estimated(configuration: Configuration) -> int:
    """The peak in bytes, from the config alone."""
    task, make_config = MODELS[configuration.model]
    with torch.device("meta"):
        base = LOADERS[task].from_config(make_config(), dtype=configuration.dtype)
    if configuration.bits:
        quantise(base, 4, ["lm_head"], double=configuration.bits == "4+")
    with torch.device("meta"):
        model = _with_adapters(base, configuration)
    return count_step(model, partial(_loss, configuration), configuration.setting).memory().peak


def counted(configuration: Configuration) -> int:
    """The peak in bytes of the CPU's allocator in the third to fifth step of a real model."""
    loaded, setting = _loaded(configuration), configuration.setting
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler:
        model: Any = _with_adapters(copy.deepcopy(loaded), configuration).train()
        if setting.gradient_checkpointing:
            base = model.get_base_model() if configuration.method != "full" else model
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            remove_input_hooks(model)
        optimizer = _optimizer(setting.optim, [p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            _step(model, configuration, optimizer)
        with record_function("steady steps"):  # the most of three: now and then the profiler's count of one is too low
            for _ in range(3):
                _step(model, configuration, optimizer)
    events: list[Any] = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "steady steps")
    changes = [event for event in events if event.name() == "[memory]"]
    there = accumulate(event.nbytes() for event in changes)
    return max(n for n, event in zip(there, changes, strict=True) if event.start_ns() >= start)


def _loaded(configuration: Configuration) -> Any:
    """A random model, quantised by transformers and bitsandbytes where the configuration says so."""
    task, make_config = MODELS[configuration.model]
    torch.manual_seed(0)
    model = LOADERS[task].from_config(make_config(), dtype=configuration.dtype)
    if not configuration.bits:
        return model
    double = configuration.bits == "4+"
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return LOADERS[task].from_pretrained(
            folder, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=configuration.dtype
        )


def _with_adapters(base: Any, configuration: Configuration) -> nn.Module:
    """Attach the plan of the method."""
    if configuration.method == "full":
        return base
    if configuration.bits:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    dropout = 0.0 if configuration.model == "Qwen3-MoE" else 0.05
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, task_type=MODELS[configuration.model][0])
    sites = find_sites(base, lora).sites
    share, _, where = configuration.method.partition(" ")
    names = [name for name, _ in base.named_modules() if name in {site.name for site in sites}]
    kept = len(names) if share == "LoRA" else len(names) // int(share[-1])
    plan = make_plan(sites, lora, names[-kept:] if where.startswith("top") else names[:kept])
    return get_peft_model(base, (plan.expand() if where.endswith("+") else plan).to_lora_config())


def _loss(configuration: Configuration, model: Any, rows: int) -> Tensor:
    tokens = torch.ones((rows, configuration.length), dtype=torch.long)
    labels = tokens[:, 0] if MODELS[configuration.model][0] == "SEQ_CLS" else tokens
    return model(input_ids=tokens, labels=labels).loss


def _step(model: Any, configuration: Configuration, optimizer: torch.optim.Optimizer) -> None:
    _loss(configuration, model, configuration.setting.rows).backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adafactor":
        return transformers.Adafactor(trained, lr=1e-3, scale_parameter=False, relative_step=False)
    if name == "sgd":
        return torch.optim.SGD(trained, lr=1e-3)
    return torch.optim.AdamW(trained, lr=1e-3, fused=name.endswith("fused"))


if __name__ == "__main__":
    main()
