"""What enable_input_require_grads costs under gradient checkpointing: saved bytes, layers run backward, step time.

    python benchmarks/checkpointing.py      # prints Markdown, appends benchmarks/results/checkpointing.jsonl

SmolLM2 (30 layers) with rank-8 LoRA on all sites, and on those of the upper half and the upper fifth. Bytes are what is
alive for the backward pass when the forward pass ends. Times are medians over rounds of interleaved
steps, and the step with the hooks against itself is the control.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers.utils import logging

from weightlora.bench.records import append_record
from weightlora.cost.step_time import interleaved, median_ratio
from weightlora.model.checkpointing import shorten_backward
from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan
from weightlora.tasks.embedded import embedded_model
from weightlora.tasks.pretrained import load_pretrained

RESULTS = Path(__file__).parent / "results" / "checkpointing.jsonl"
LAYERS = 30


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds; default: %(default)s")
    parser.add_argument("--rows", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row; default: %(default)s")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = torch.arange(arguments.rows * arguments.length).reshape(arguments.rows, arguments.length) + 1000
    print("| lowest layer | layers run backward | saved MB | step time ÷ with hooks | with hooks ÷ with hooks |")
    print("| --- | --- | --- | --- | --- |")
    for lowest in (0, LAYERS // 2, LAYERS * 4 // 5):
        model = planned(lowest)
        short, hooked = (partial(prepared_step, model, tokens, hooks=hooks) for hooks in (False, True))
        before, after = hooked(), short()
        first, with_short, second = interleaved([before.again, after.again, before.again], arguments.rounds)
        ratio, control = median_ratio(with_short, first), median_ratio(second, first)
        layers = f"{after.layers} of {before.layers}"
        saved = f"{after.saved_bytes / 1e6:.1f} of {before.saved_bytes / 1e6:.1f}"
        print(f"| {lowest} | {layers} | {saved} | {ratio:.3f} | {control:.3f} |", flush=True)
        counts = {
            f"{name}_{key}": getattr(measured, key)
            for name, measured in (("short", after), ("hooked", before))
            for key in ("layers", "saved_bytes")
        }
        shape = {"rows": arguments.rows, "length": arguments.length, "rounds": arguments.rounds}
        times = {"time_ratio": ratio, "control_ratio": control}
        append_record(RESULTS, {"model": "smollm2", "lowest": lowest, **shape, **counts, **times})


@dataclass(frozen=True)
class Measured:
    """A training step, and what its first run showed."""

    layers: int
    """Layers whose output had a gradient."""
    saved_bytes: int
    again: Callable[[], None]


def planned(lowest: int) -> Any:
    """SmolLM2 with checkpointing, and LoRA on the sites of the layers from ``lowest`` up."""
    found = embedded_model("embedded/smollm2")
    assert found is not None
    base = load_pretrained("AutoModelForCausalLM", found[0], seed=0, gguf_file=found[1], dtype="float32")
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    sites = find_sites(base, lora).sites
    plan = make_plan(sites, lora, [s.name for s in sites if int(s.block.rpartition(".")[2]) >= lowest])
    model = plan.attach(base).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return model


def prepared_step(model: Any, tokens: Tensor, *, hooks: bool) -> Measured:
    """Count what a step with or without the hooks saves and runs; return it for the timing."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def again() -> None:
        shorten_backward(model)
        if hooks:
            model.get_base_model().enable_input_require_grads()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ran, handles = watch(model.get_base_model().model.layers)
    again()
    for handle in handles:
        handle.remove()
    return Measured(len(ran), saved_bytes(model, tokens), again)


def watch(layers: Sequence[Any]) -> tuple[set[int], list[Any]]:
    """The layers whose output has had a gradient, filled as they run; and the hooks to take off."""
    ran: set[int] = set()

    def see(number: int, _: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: ran.add(number))

    return ran, [layer.register_forward_hook(partial(see, number)) for number, layer in enumerate(layers)]


def saved_bytes(model: Any, tokens: Tensor) -> int:
    """Bytes that are alive for the backward pass, each storage once, parameters not counted.

    The holders are what autograd holds: those that checkpointing let go of are dead by the end of the forward pass.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    holders: weakref.WeakSet[_Holder] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        holders.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = model(tokens, labels=tokens).loss
    alive = {holder.tensor.untyped_storage().data_ptr(): holder.tensor.untyped_storage().nbytes() for holder in holders}
    del loss
    return sum(size for address, size in alive.items() if address not in parameters)


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


if __name__ == "__main__":
    main()
