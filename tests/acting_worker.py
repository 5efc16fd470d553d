"""What each of two processes does for test_distributed_methods.py: methods that act while they train, under DDP.

torchrun --nproc_per_node 2 acting_worker.py FOLDER; each part leaves ``<part>-<process>.json`` and, where it trained an
adapter, ``<part>-<process>.safetensors`` there.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from weightlora.errors import WeightLoraError
from weightlora.methods import alora, dynamic_lora, flexlora, increlora, pruned_lora, riemannian
from weightlora.methods.families import moving
from weightlora.model.distributed import process_count
from weightlora.trainer.attach import method_for

ROWS, STEPS = 8, 8  # rows of a micro-batch, on all processes together
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
#: Decisions in several of the steps.
METHODS = {
    "adalora": {"deltaT": 2, "tinit": 1, "tfinal": 1},
    "increlora": {"begin": 0.1, "end": 0.8, "interval": 1},
    "dynamic_lora": {"begin": 0.2, "end": 0.8, "interval": 2},
    "pruned_lora": {"interval": 2, "count": 2},
    "alora": {"rounds": 2, "begin": 0.4, "interval": 2, "probe_rows": ROWS},
    "riemannian": {},
    "flexlora": {"clients": 2, "rounds": 3},
}


def sentences(folder, rows, **arguments):
    """A trainer of a classifier; each row counts alike."""
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = BertForSequenceClassification(BertConfig(vocab_size=50, initializer_range=0.3, **SIZES, **still))
    tokens = torch.randint(1, 50, (10 * ROWS, 6))
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    quick = {"ddp_find_unused_parameters": False, **arguments}
    made = trainer(folder, base, rows, data, None, task_type="SEQ_CLS", **quick)
    made.model_accepts_loss_kwargs = False  # BERT's loss is a mean over rows, whatever its **kwargs promise
    return made


def texts(folder, rows, **arguments):
    """A trainer of a language model on texts of 3 to 10 tokens, two micro-batches a step; each token counts alike."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.3, **SIZES))
    data = [torch.randint(1, 50, (3 + i % 8,)) for i in range(20 * ROWS)]

    def collate(rows):
        ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, -100))
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}

    twice = {"gradient_accumulation_steps": 2, **arguments}
    return trainer(folder, base, rows, data, collate, task_type="CAUSAL_LM", **twice)


def trainer(folder, base, rows, data, collate, *, task_type, **arguments):
    """SGD, since Adam divides a gradient by its size: next to zero, rounding decides."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task_type)
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 3}
    plain = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": STEPS}
    options = {"per_device_train_batch_size": rows // process_count(), **quiet, **plain, **arguments}
    model = get_peft_model(base, lora)
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=data, data_collator=collate)


BEDS = {"sentences": sentences, "texts": texts}


class Ranks(TrainerCallback):
    """Notes a method's ranks after each step."""

    def __init__(self, method):
        self.method, self.seen = method, []

    def on_step_end(self, *_args, **_named):
        self.seen.append(list(self.method.plan.ranks.values()))


def trained(bed, name, folder, rows=ROWS, resume=None, **arguments):
    """What this process holds at the end, as stock LoRA, and the ranks after each step."""
    trainer = BEDS[bed](folder, rows, **arguments)
    method = method_for(trainer, name, **METHODS[name])
    ranks = Ranks(method)
    trainer.add_callback(ranks)
    trainer.train(resume_from_checkpoint=resume)
    model = method.export(trainer.model)
    weights = {n: p.detach().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    return weights, {"ranks": ranks.seen, "options": dict(method.plan.options)}


# -- two processes ---------------------------------------------------------------------------------------------------

#: What decides in each method, and what a device that rounds otherwise might make of it: here, the opposite.
DECISIONS = {
    "adalora": (RankAllocator, "_combine_ipt", lambda decide: lambda *given: -decide(*given)),
    "increlora": (increlora, "growth", lambda decide: lambda scores, *rest, **named: decide(
        [-score for score in scores], *rest, **named)),
    "dynamic_lora": (dynamic_lora, "_all_but", lambda decide: lambda shares, count: decide(
        {name: -share for name, share in shares.items()}, count)),
    "pruned_lora": (pruned_lora, "removal_cost", lambda decide: lambda *given: -decide(*given)),
    "alora": (alora, "moves", lambda decide: lambda scores, *rest, **named: decide(-scores, *rest, **named)),
    "riemannian": (riemannian, "preconditioned", lambda decide: lambda *given: tuple(-g for g in decide(*given))),
    "flexlora": (flexlora, "truncated", lambda decide: lambda *given: tuple(2 * g for g in decide(*given))),
}  # fmt: skip
SHARING = {"from_first": lambda make: make(), "copy_from_first": lambda _tensors: None, "average": lambda mean: mean}


class Replaced:
    """Attributes of modules and classes, replaced for the length of a block."""

    def __init__(self, *changes):
        self.changes = changes

    def __enter__(self):
        self.before = [(owner, name, vars(owner)[name]) for owner, name, _ in self.changes]
        for change in self.changes:
            setattr(*change)

    def __exit__(self, *_error):
        for owner, name, value in self.before:
            setattr(owner, name, value)


def unshared(*modules):
    return Replaced(
        *((module, name, alone) for module in modules for name, alone in SHARING.items() if name in vars(module))
    )


def other_decisions(name):
    """The second process decides otherwise."""
    owner, attribute, otherwise = DECISIONS[name]
    return Replaced(*[(owner, attribute, otherwise(vars(owner)[attribute]))] * dist.get_rank())


class Worker:
    def __init__(self, folder):
        self.folder, self.process = folder, dist.get_rank()

    def tell(self, part, value):
        (self.folder / f"{part}-{self.process}.json").write_text(json.dumps(value))

    def train(self, part, *given, folder=None, **options):
        weights, notes = trained(*given, self.folder / (folder or part), **options)
        save_file(weights, self.folder / f"{part}-{self.process}.safetensors")
        self.tell(part, notes)

    def error(self, part, action, *given, **options):
        try:
            action(*given, **options)
        except WeightLoraError as error:
            self.tell(part, str(error))

    def acting(self, name):
        module = import_module(f"weightlora.methods.{name}")
        for bed in BEDS:
            self.train(f"{bed}-{name}", bed, name)
        with other_decisions(name):
            self.train(f"disturbed-{name}", "sentences", name)
            with unshared(module):
                self.error(f"unshared-{name}", trained, "sentences", name, self.folder / f"unshared-{name}")

    def own_statistics(self):
        """Each process decides on its own rows."""
        for name, module in (("increlora", increlora), ("alora", alora)):
            with unshared(module):
                self.error(f"own-{name}", trained, "sentences", name, self.folder / f"own-{name}")

    def resumed(self, name):
        saving = {"save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
        self.train(f"whole-{name}", "texts", name, **saving)
        saving |= {"save_strategy": "no", "resume": str(self.folder / f"whole-{name}" / "checkpoint-4")}
        with Replaced(*[(moving, "_read", no_file)] * self.process):  # as on another node's disk
            self.train(f"resumed-{name}", "texts", name, folder=f"whole-{name}", **saving)

    def skipping(self):
        """The second process leaves out a layer, as LayerDrop and experts do."""
        self.error("skipping", train_skipping, self.folder / "skipping")

    def parted(self):
        """Half of a matrix on each process, as tensor parallelism leaves it."""
        made = sentences(self.folder / "parted", ROWS)
        layer = made.model.base_model.model.bert.pooler.dense.base_layer
        half = distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
        layer.weight = nn.Parameter(half, requires_grad=False)
        self.error("parted", method_for, made, "adalora")


def no_file(path):
    raise AssertionError(f"{path} is not there")


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.first(x)
        return {"loss": (hidden if dist.get_rank() else self.second(hidden)).square().mean()}


def train_skipping(folder):
    made = trainer(folder, Skipping(), ROWS, [{"x": torch.ones(4)}] * 12 * ROWS, None, task_type=None)
    method_for(made, "increlora", **METHODS["increlora"])
    made.train()


def main(folder):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    worker = Worker(folder)
    for name in METHODS:
        worker.acting(name)
    worker.own_statistics()
    worker.resumed("adalora")
    worker.resumed("increlora")
    worker.skipping()
    worker.parted()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
