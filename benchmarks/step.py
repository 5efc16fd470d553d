"""What one training step costs, in time and in saved bytes, against the frozen model and against stock PEFT LoRA.

    python benchmarks/step.py minilm          # also: smollm2, llama; appends benchmarks/results/step.jsonl
    python benchmarks/step.py llama --few     # without full fine-tuning and the rivals
    python benchmarks/step.py minilm --only "limit" "PEFT LoRA, dropout 0.05" "fast, input dropout 0.05"
    python benchmarks/step.py llama --device cuda
    python benchmarks/step.py table           # Markdown and benchmarks/results/step.png from the stored records

A step is forward, backward and AdamW, on a CPU with one thread. The steps of all rows are interleaved in one
process, in a random order each round; a ratio is the median over the rounds, and the limit against itself is the
control. Saved bytes are exact counts of what autograd holds; peak bytes are the most that the first step has allocated
at one time, with the optimizer's state. The limit is the frozen model without adapters whose backward pass runs to the
embeddings: what any adapter at the bottom of the model must pay.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import profile
from tqdm import tqdm
from warmup import gated_bytes

import weightlora
from weightlora.bench.records import append_record, read_records
from weightlora.cost.step_time import interleaved, median_ratio, saved_bytes
from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.selection.rules.first_order import FirstOrder

RESULTS = Path(__file__).parent / "results"
LIMIT, CONTROL, STOCK, STOCK_0 = "limit", "limit again", "PEFT LoRA, dropout 0.05", "PEFT LoRA, dropout 0"
P = 0.05
RIVALS = ("full fine-tuning", "PEFT AdaLoRA", "PEFT DoRA", "PEFT VeRA", "ΔW built in every forward, dropout 0")


@dataclass(frozen=True)
class Setting:
    """A frozen model, what it is trained on, and the adapters wanted."""

    base: nn.Module
    batches: Sequence[dict[str, Tensor]]
    lora: LoraConfig
    shape: str
    head_steps: int = 0
    """Steps in which select() trains a fresh head first."""

    def on(self, device: str) -> Setting:
        """The same on ``device``; the model itself moves there."""
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in self.batches]
        return replace(self, base=self.base.to(device), batches=batches)


@dataclass(frozen=True)
class Row:
    """One way to train: the model, and what is done beside forward, backward and AdamW."""

    model: Any
    gated: bool = False
    after_backward: Callable[[int], None] | None = None


def main() -> None:
    """Measure one model, or print and draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SETTINGS, "table"])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; default: %(default)s")
    parser.add_argument("--few", action="store_true", help="leave out full fine-tuning and the rivals")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--only", nargs="+", default=[], help="measure these rows alone, and print without storing")
    arguments = parser.parse_args()
    if arguments.what == "table":
        records = latest(read_records(RESULTS / "step.jsonl"))
        print_table(records)
        draw(records, RESULTS / "step.png")
        return
    torch.set_num_threads(1)
    setting = SETTINGS[arguments.what]().on(arguments.device)
    few = [name for name in make_rows(setting) if name not in RIVALS] if arguments.few else []
    measured = measure(setting, arguments.rounds, arguments.only or few)
    run = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for record in measured:
        if arguments.only:
            ratio = median_ratio(record["seconds"], measured[0]["seconds"])
            print(f"{record['row']:32} {ratio:.3f} {record['saved_bytes']} {record['peak_bytes']}")
        else:
            name = arguments.what if arguments.device == "cpu" else f"{arguments.what}, {arguments.device}"
            append_record(RESULTS / "step.jsonl", {"model": name, "run": run, **record})
    if not arguments.only:
        print_table(latest(read_records(RESULTS / "step.jsonl")))


def measure(setting: Setting, rounds: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """Build the rows, count their bytes, and time their steps, interleaved."""
    rows = {name: make() for name, make in make_rows(setting).items() if not only or name in only}
    gc.collect()
    batch = setting.batches[0]
    held = {name: _bytes(row, batch) for name, row in rows.items()}
    with tqdm(total=(rounds + 2) * len(rows), desc="steps") as bar:
        steps = [_step(row, batch, bar) for row in rows.values()]
        peaks = [(peak_bytes if batch["input_ids"].is_cpu else accelerator_peak_bytes)(step) for step in steps]
        seconds = interleaved(steps, rounds)
    sizes = {name: sum(p.numel() for p in row.model.parameters() if p.requires_grad) for name, row in rows.items()}
    return [
        {
            "row": name,
            "batch": setting.shape,
            "seconds": times,
            "saved_bytes": held[name],
            "peak_bytes": peak,
            "trained": sizes[name],
        }
        for name, times, peak in zip(rows, seconds, peaks, strict=True)
    ]


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes that a step has allocated at one time, above what was there before it."""
    with profile(profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"))


def accelerator_peak_bytes(step: Callable[[], None]) -> int:
    """The same where the device itself counts."""
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    step()
    return torch.accelerator.max_memory_allocated() - before


def make_rows(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Every way to train. The frozen weights are the same tensors in all rows but full fine-tuning."""
    n = len(find_sites(setting.base, setting.lora).sites)

    @cache
    def plan(k: int) -> weightlora.AdapterPlan:
        return _plan(setting, k)

    def planned(k: int, *, expand: bool = False, **overrides: Any) -> Any:
        return (plan(k).expand() if expand else plan(k)).attach(_shared(setting.base), **overrides)

    return {
        LIMIT: lambda: Row(_limit(setting.base)),
        CONTROL: lambda: Row(_limit(setting.base)),
        "full fine-tuning": lambda: Row(deepcopy(setting.base).requires_grad_(True)),
        STOCK: lambda: Row(_lora(setting, P)),
        STOCK_0: lambda: Row(_lora(setting, 0.0)),
        "fast, input dropout 0.05": lambda: Row(_fast(_lora(setting, P))),
        "fast, rank dropout 0.05": lambda: Row(_fast(_lora(setting, P), "rank")),
        "fast, dropout 0": lambda: Row(_fast(_lora(setting, 0.0))),
        "gates, dropout 0.05": lambda: Row(_lora(setting, P), gated=True),
        "gates, fast, dropout 0.05": lambda: Row(_fast(_lora(setting, P)), gated=True),
        "gates, fast, dropout 0": lambda: Row(_fast(_lora(setting, 0.0)), gated=True),
        "WeightLoRA, K = n/2": lambda: Row(planned(n // 2)),
        "WeightLoRA, K = n/2, fast": lambda: Row(_fast(planned(n // 2))),
        "WeightLoRA, K = n/2, fast, rank dropout": lambda: Row(_fast(planned(n // 2), "rank")),
        "WeightLoRA, K = n/2, fast, dropout 0": lambda: Row(_fast(planned(n // 2, lora_dropout=0.0))),
        "WeightLoRA, K = n/4": lambda: Row(planned(n // 4)),
        "WeightLoRA, K = n/4, fast": lambda: Row(_fast(planned(n // 4))),
        "WeightLoRA+": lambda: Row(planned(n // 2, expand=True)),
        "WeightLoRA+, fast": lambda: Row(_fast(planned(n // 2, expand=True))),
        "PEFT AdaLoRA": lambda: _adalora(setting),
        "PEFT DoRA": lambda: Row(_lora(setting, P, use_dora=True)),
        "PEFT VeRA": lambda: Row(get_peft_model(_shared(setting.base), VeraConfig(vera_dropout=P, **_common(setting)))),
        "ΔW built in every forward, dropout 0": lambda: Row(_built(setting)),
    }


# -- the rows --------------------------------------------------------------------------------------------------------


def _shared(base: nn.Module) -> Any:
    """A copy of the modules around the same frozen weights."""
    tensors = [*base.parameters(), *base.buffers()]
    return deepcopy(base, memo={id(tensor): tensor for tensor in tensors})


def _limit(base: nn.Module) -> nn.Module:
    model = _shared(base)
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    return model


def _lora(setting: Setting, p: float, **options: Any) -> Any:
    lora = deepcopy(setting.lora)
    lora.lora_dropout = p
    lora.target_modules = sorted(site.name for site in find_sites(setting.base, lora).sites)
    for name, value in options.items():
        setattr(lora, name, value)
    return get_peft_model(_shared(setting.base), lora)


def _fast(model: Any, dropout: Any = "input") -> Any:
    return weightlora.enable_fast_lora(model, dropout=dropout)


def _common(setting: Setting) -> dict[str, Any]:
    targets = sorted(site.name for site in find_sites(setting.base, setting.lora).sites)
    return {"task_type": setting.lora.task_type, "target_modules": targets}


def _adalora(setting: Setting) -> Row:
    """AdaLoRA in its middle phase, where it scores and cuts ranks at each step."""
    config = AdaLoraConfig(target_r=8, init_r=12, total_step=10_000, lora_dropout=P, **_common(setting))
    model: Any = get_peft_model(_shared(setting.base), config)  # type: ignore[arg-type]
    return Row(model, after_backward=model.base_model.update_and_allocate)


def _plan(setting: Setting, k: int) -> weightlora.AdapterPlan:
    lora = deepcopy(setting.lora)
    lora.lora_dropout = P
    return weightlora.select(
        _shared(setting.base),
        setting.batches,
        lora=lora,
        adapters=k,
        rule=FirstOrder(head_steps=setting.head_steps),
        progress=False,
    )


class BuiltDelta(nn.Module):
    """y = x·(W0 + ω·s·B·A)ᵀ + bias, with ΔW made anew in every forward pass, as the paper's authors do it."""

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(base.weight.new_empty(r, base.in_features).normal_(std=1 / r))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.omega = nn.Parameter(base.weight.new_ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        delta = self.omega * self.scale * self.b @ self.a
        return nn.functional.linear(x, self.base.weight + delta, self.base.bias)


def _built(setting: Setting) -> nn.Module:
    model = _shared(setting.base)
    for site in find_sites(model, setting.lora).sites:
        parent, _, child = site.name.rpartition(".")
        layer: Any = model.get_submodule(site.name)
        delta = BuiltDelta(layer, setting.lora.r, setting.lora.lora_alpha / setting.lora.r)
        setattr(model.get_submodule(parent), child, delta)
    return model


# -- one step --------------------------------------------------------------------------------------------------------


def _bytes(row: Row, batch: dict[str, Tensor]) -> int:
    row.model.train()
    if row.gated:
        return gated_bytes(row.model, batch, torch.ones(len(lora_layers(row.model))))
    return saved_bytes(row.model, batch)


def _step(row: Row, batch: dict[str, Tensor], bar: tqdm[Any]) -> Callable[[], None]:
    """One training step, as often as it is called."""
    trained = [p for p in row.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None  # Trainer's default
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        row.model(**batch).loss.backward()
        if row.after_backward is not None:
            row.after_backward(done)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def gated_step() -> None:
        with gated(lora_layers(row.model)) as gates:
            row.model(**batch).loss.backward()
            omega = gates.omega - 1e-6 * gates.gradient
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad()
            gates.write(omega)

    def counted() -> None:
        (gated_step if row.gated else step)()
        bar.update()

    return counted


# -- the models ------------------------------------------------------------------------------------------------------


def _minilm() -> Setting:
    """MiniLM, 32 film reviews of at most 32 tokens, a fresh head."""
    from transformers import DataCollatorWithPadding

    from weightlora.tasks.classification import encode, load_classifier, shuffled_batches
    from weightlora.tasks.embedded import minilm, rotten_tomatoes
    from weightlora.tasks.pretrained import load_tokenizer

    tokenizer = load_tokenizer(minilm())
    rows = encode(tokenizer, rotten_tomatoes(train=1280, test=0).train, max_length=32)
    batches = shuffled_batches(rows, DataCollatorWithPadding(tokenizer), batch_size=32, count=40, seed=0)
    base = load_classifier(minilm(), labels=2, seed=0).requires_grad_(False)
    return Setting(base, batches, LoraConfig(r=8, lora_alpha=32, task_type="SEQ_CLS"), "32 reviews of 32 tokens", 20)


def _smollm2() -> Setting:
    """SmolLM2-135M, 4 × 64 tokens of film reviews."""
    from weightlora.tasks.embedded import rotten_tomatoes, smollm2
    from weightlora.tasks.pretrained import load_pretrained, load_tokenizer

    file = smollm2()
    tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
    base = load_pretrained("AutoModelForCausalLM", file.parent, seed=0, gguf_file=file.name, dtype=torch.float32)
    text = " ".join(sentence for sentence, _ in rotten_tomatoes(train=600, test=0).train)
    tokens = torch.tensor(tokenizer(text)["input_ids"][: 20 * 256]).view(20, 4, 64)
    return _causal(base, tokens)


def _llama() -> Setting:
    """A random Llama of hidden size 2048 with 4 layers, 2 × 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16))
    return _causal(base, torch.randint(0, 1000, (20, 2, 64)))


def _causal(base: Any, tokens: Tensor) -> Setting:
    batches = [{"input_ids": batch, "labels": batch} for batch in tokens]
    lora = LoraConfig(r=8, lora_alpha=32, task_type="CAUSAL_LM")
    base.config.use_cache = False
    return Setting(base.requires_grad_(False), batches, lora, f"{tokens.shape[1]} texts of {tokens.shape[2]} tokens")


SETTINGS = {"minilm": _minilm, "smollm2": _smollm2, "llama": _llama}


# -- what was measured -----------------------------------------------------------------------------------------------


def latest(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of each model's last run on each kind of processor."""
    last = {_label(record): record["run"] for record in records}
    return {
        label: {record["row"]: record for record in records if (_label(record), record["run"]) == (label, run)}
        for label, run in last.items()
    }


def _label(record: dict[str, Any]) -> str:
    """The model, and the processor's instructions where they are on record: not all of one name have the same."""
    instructions = record["provenance"]["hardware"].get("instructions")
    return f"{record['model']}, {instructions}" if instructions and record["model"] in SETTINGS else record["model"]


def print_table(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print each model's rows, against the limit and against stock LoRA with the same dropout."""
    for model, rows in found.items():
        limit, stock = rows[LIMIT], rows[STOCK]
        threads = ", one thread" if limit["model"] in SETTINGS else ""  # other devices are named behind the model
        print(f"\n{model}, {limit['batch']}, {limit['provenance']['hardware']['device']}{threads}; ", end="")
        print(f"the limit takes {1e3 * statistics.median(limit['seconds']):.0f} ms")
        print(f"and saves {limit['saved_bytes'] / 2**20:.1f} MiB\n")
        print("| row | trained | time ÷ limit | ÷ PEFT LoRA | saved bytes ÷ limit | ÷ PEFT LoRA | peak ÷ PEFT LoRA |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, row in rows.items():
            against = rows[STOCK_0] if name.endswith("dropout 0") else stock
            ratios = [median_ratio(row["seconds"], by["seconds"]) for by in (limit, against)]
            ratios += [row["saved_bytes"] / by["saved_bytes"] for by in (limit, against)]
            ratios += [row["peak_bytes"] / against["peak_bytes"]]
            print(f"| {name} | {row['trained']:,} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")


def draw(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Write one chart: time and saved bytes of each row over the limit's, three models side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    down, across = -(-len(found) // 3), min(len(found), 3)
    figure = Figure(figsize=(4 + 3.5 * across, (1.5 + 0.3 * len(names)) * down), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    fields = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (model, rows) in zip(fields.flat, found.items(), strict=False):  # the last row may have free places
        limit = rows[LIMIT]
        times = {name: median_ratio(row["seconds"], limit["seconds"]) for name, row in rows.items()}
        held = {name: row["saved_bytes"] / limit["saved_bytes"] for name, row in rows.items()}
        for ratios, shift, label in ((times, -0.2, "time"), (held, 0.2, "saved bytes")):
            values = [ratios.get(name, 0.0) for name in names]
            axes.barh([i + shift for i in range(len(names))], values, height=0.38, label=label)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(f"{model}: {rows[LIMIT]['batch']}", size=9)
        axes.set_xlabel("÷ limit (frozen model)")
    fields[0, 0].invert_yaxis()
    fields[0, -1].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
