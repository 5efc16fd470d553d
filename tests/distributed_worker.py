"""What two processes do for test_distributed.py, test_fsdp2.py and test_store.py, by the first word.

torchrun --nproc_per_node 2 distributed_worker.py first FOLDER      # or second
accelerate launch --config_file fsdp2.yaml --num_processes 2 distributed_worker.py recipe RECIPE [--option=value ...]
torchrun --nproc_per_node 2 distributed_worker.py llama OUTPUT store    # or the name of a method; also one process

FOLDER holds a small base model and rows; a part leaves a run's folder or ``<part>-<process>.json`` there.
"""

import json
import os
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
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

import weightlora
from weightlora.errors import OptionError, SelectionError
from weightlora.fast import enable as fast_layer
from weightlora.fast.enable import fast_dropout
from weightlora.model.layers import lora_layers
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train
from weightlora.selection import _measured as measured
from weightlora.selection import stage
from weightlora.selection.rules.first_order import FirstOrder
from weightlora.selection.rules.paper import StoIHT
from weightlora.selection.rules.pursuit import Pursuit
from weightlora.trainer.attach import method_for
from weightlora.trainer.store import store_frozen

ROWS = 8  # of a step, on all processes together
LIMITS = {"memory": "240kB", "time": 0.9}  # in bytes half of the rows pay for seven sites, all of them for three


class Short(Pursuit):
    """The rule with few rounds and batches."""

    rounds = probes = 2


RULES = {
    "first_order": FirstOrder(head_steps=4),
    "paper": StoIHT(head_steps=4, gate_lr=50.0),
    "pursuit": Short(head_steps=0),
}
LORA = LoraConfig(r=2, target_modules=r".*encoder.*(query|key|value|dense)", task_type="SEQ_CLS")


def recipe(folder, name, rows, *words):
    """The training of all parts. SGD, since Adam divides a gradient by its size: next to zero, rounding decides."""
    return read_recipe(
        words=[
            *(
                "--model_name_or_path",
                f"{folder}/base",
                "--task",
                "rotten_tomatoes",
                "--output_dir",
                f"{folder}/{name}",
            ),
            *("--train_file", f"{folder}/train.csv", "--validation_file", f"{folder}/validation.csv"),
            *("--max_seq_length", "16", "--per_device_train_batch_size", str(rows), "--max_steps", "4"),
            *(
                "--rule",
                "first_order",
                "--rule_options",
                "head_steps=4",
                "--steps",
                "4",
                "--adapters",
                "5",
                "--lora_r",
                "4",
            ),
            *("--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant", "--seed", "3"),
            *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--save_strategy", "no", *words),
        ]
    )


def small_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes, **still))


def small_batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 50, (ROWS, 6), generator=generator),
            "labels": torch.randint(0, 2, (ROWS,), generator=generator),
        }
        for _ in range(12)
    ]


def small_plan(model, batches, rule="first_order", **options):
    arguments = {"lora": LORA, "adapters": 5, "steps": 8, "learning_rate": 1e-2, "progress": False}
    return weightlora.select(model, batches, rule=RULES[rule], **{**arguments, **options})


def shares(batches, process, processes):
    return [{key: value[process::processes] for key, value in batch.items()} for batch in batches]


def token_trainer(folder, name, rows, **arguments):
    """A trainer on rows of 3 to 10 tokens: the mean over the tokens of a step is not that of two processes' means."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    texts = [torch.randint(1, 50, (3 + i % 8,)) for i in range(6 * ROWS)]

    def collate(texts):
        ids, labels = (pad_sequence(texts, batch_first=True, padding_value=value) for value in (0, -100))
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}

    options = {"per_device_train_batch_size": rows, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return Trainer(
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")),
        TrainingArguments(f"{folder}/{name}", **options, **arguments),
        train_dataset=texts,
        data_collator=collate,
    )


class Witness(TrainerCallback):
    """Remembers what this process trains, and with how much of it."""

    def on_train_begin(self, _args, state, _control, model, **_):
        self.first_step = state.global_step
        self.ranks = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
        self.sharded = isinstance(model, FSDPModule)
        self.fast = fast_dropout(model)

    def on_train_end(self, _args, state, _control, model, **_):
        trained = [getattr(p, "_local_tensor", p) for p in model.parameters() if p.requires_grad]
        self.elements = sum(tensor.numel() for tensor in trained)
        self.sums = [tensor.detach().double().sum().item() for tensor in trained]
        self.last_step = state.global_step


class Worker:
    def __init__(self, folder):
        self.folder, self.process, self.processes = folder, dist.get_rank(), dist.get_world_size()
        self.data = shares(small_batches(), self.process, self.processes)

    def tell(self, part, value):
        (self.folder / f"{part}-{self.process}.json").write_text(json.dumps(value))

    def tell_error(self, part, error, action, *arguments, **options):
        try:
            action(*arguments, **options)
        except error as found:
            self.tell(part, str(found))

    def train(self, name, *words):
        witness = Witness()
        train(recipe(self.folder, name, ROWS // self.processes, *words), callbacks=[witness])
        self.tell(name, vars(witness))

    def sharded(self, model, layers):
        for layer in layers:
            fully_shard(layer)
        return fully_shard(model)

    def sharded_selection(self):
        own = self.data[0]
        losses, gathered = [small_model().eval()(**own).loss.item()], []
        model = small_model().eval()
        self.sharded(model, model.bert.encoder.layer)
        wrong = {"loss_fn": lambda model, batch: model(**batch).loss * float("nan")}
        self.tell_error("not_finite", SelectionError, small_plan, model, self.data, **wrong)
        for rule in RULES:
            losses.append(model(**own).loss.item())  # leaves the weights around the layers gathered
            small_plan(model, self.data, rule).save(self.folder / f"sharded-{rule}-{self.process}.plan")
            gathered += [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]

        model = get_peft_model(small_model(), deepcopy(LORA))
        self.sharded(model, model.base_model.model.bert.encoder.layer)
        small_plan(model, self.data, lora=None).save(self.folder / f"sharded-peft-{self.process}.plan")
        losses.append(model.eval()(**own).loss.item())
        self.tell("afterwards", {"losses": losses, "gathered": gathered})

    def unaveraged_selection(self):
        """Gradients that are not averaged over the processes: an error."""
        average, stage.average_gradients = stage.average_gradients, lambda _: None
        self.tell_error("unaveraged", SelectionError, small_plan, small_model(), self.data)
        stage.average_gradients = average

    def limited_selection(self):
        """Budgets that are measured, on shares of unequal size: the first process measures for both."""
        own = self.data if self.process == 0 else shares(self.data, 0, 2)
        for name, limit in LIMITS.items():
            plan = small_plan(small_model(), own, adapters=None, **{name: limit})
            plan.save(self.folder / f"limit-{name}-{self.process}.plan")
        first, measured.from_first = measured.from_first, lambda make: make()
        self.tell_error("apart", SelectionError, small_plan, small_model(), own, adapters=None, memory=LIMITS["memory"])
        measured.from_first = first

    def token_selection(self, name, **arguments):
        weightlora.select_for(token_trainer(self.folder, name, ROWS // self.processes, **arguments), steps=6)

    def interrupted(self, name, *words):
        """The same run twice, the second time from what a kill after step 2 would have left."""
        # AdamW has a state to lose; torch cannot load that of SGD, which has none.
        words = (*words, "--optim", "adamw_torch", "--save_strategy", "steps", "--save_steps", "2")
        self.train(name, *words)
        (self.folder / f"{name}-{self.process}.json").rename(self.folder / f"{name}-whole-{self.process}.json")
        if self.process == 0:
            for path in (self.folder / name / "checkpoint-4", self.folder / name / "adapter"):
                shutil.rmtree(path)
            (self.folder / name / "results.json").unlink()
        dist.barrier()
        self.train(name, *words)


def shard_on_cpu():
    """Accelerate shards on accelerators only, and ignores the wish elsewhere; told to, it does the same on a CPU."""
    initialise = AcceleratorState.__init__

    def told(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = told


def run_part(folder, part):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    fast_layer.LEAST_NUMBERS = fast_layer.LEAST_WITH_INPUT_DROPOUT = 0  # or all calls here were too small for it
    PARTS[part](folder, Worker(folder))
    dist.destroy_process_group()


def first_part(folder, worker):
    worker.sharded_selection()
    worker.unaveraged_selection()
    worker.limited_selection()
    worker.token_selection("tokens")
    worker.token_selection("tokens_apart", average_tokens_across_devices=False)
    worker.train("ddp", "--ddp_find_unused_parameters", "False")
    shard_on_cpu()
    worker.train("fsdp_plan", "--fsdp", "--fsdp_config", json.dumps(LAYERS), "--plan", f"{folder}/ddp/plan.json")


def second_part(folder, worker):
    """Trains the first part's plan, among others."""
    plan = ("--plan", f"{folder}/ddp/plan.json")
    worker.train("ddp_fast", "--ddp_find_unused_parameters", "False", *plan, "--fast")

    shard_on_cpu()
    partly = ("--fsdp", "--fsdp_config", json.dumps({**LAYERS, "cpu_ram_efficient_loading": True}))
    fsdp = ("--fsdp", "--fsdp_config", json.dumps(LAYERS))
    worker.train("fsdp", *fsdp)
    worker.train("fsdp_fast", *fsdp, *plan, "--fast")
    worker.interrupted("fsdp_again", *fsdp, *plan)
    worker.tell_error("measured", OptionError, worker.train, "measured", *fsdp, "--eval_on_start")
    worker.tell_error("partly", OptionError, worker.train, "partly", *partly)
    worker.tell_error("partly_plan", OptionError, worker.train, "partly_plan", *partly, *plan)


PARTS = {"first": first_part, "second": second_part}
LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}


# -- a recipe under FSDP2 --------------------------------------------------------------------------------------------


class Held(TrainerCallback):
    """Counts, at the end of the training, the numbers that this process holds, and those of the whole model."""

    def on_train_end(self, args, state, control, model, **_):  # noqa: ARG002
        weights = list(model.parameters())
        held = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
        self.seen = {"held": held, "whole": sum(w.numel() for w in weights), "processes": dist.get_world_size()}


def train_recipe(path, *words):
    """Train, and tell which of the weights are shards."""
    shard_on_cpu()
    recipe, witness = read_recipe(path, words), Held()
    train(recipe, callbacks=[witness])
    (recipe.output_dir / f"seen-{dist.get_rank()}.json").write_text(json.dumps(witness.seen))
    dist.destroy_process_group()


# -- a tiny Llama in one process, or one of several ------------------------------------------------------------------


def train_llama(output, what):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
    torch.set_num_threads(1)
    targets = r".*layers\.[23]\..*q_proj" if what == "store" else "all-linear"
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    tokens = [[3 + (7 * i + j * j) % 29 for j in range(6)] for i in range(16)]
    arguments = TrainingArguments(
        str(output / "run"),
        num_train_epochs=3,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    if what == "store":
        store = store_frozen(trainer, folder=output / "states")
        trainer.train()
        assert store.hits == 2 * store.misses > 0
    else:
        method_for(trainer, what, steps=3)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 12
    if trainer.is_world_process_zero():
        trained = {
            n.removeprefix("module."): p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad
        }
        save_file(trained, output / "trained.safetensors")


def main(what, *words):
    if what in PARTS:
        run_part(Path(words[0]), what)
    elif what == "recipe":
        train_recipe(*words)
    else:
        train_llama(Path(words[0]), words[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
