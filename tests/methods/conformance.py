"""What every method of the registry keeps; the files ``test_conformance_*.py`` run these checks, each on its models.

A new line in METHODS is enough: each check runs for it. Options are passed to the methods that have them.
"""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from weightlora.cost.step_time import Peak
from weightlora.methods import METHODS, entry_of, options_of
from weightlora.methods.families.moving import take_up
from weightlora.selection.rules.first_order import FirstOrder
from weightlora.trainer.attach import method_for

NAMES = [entry.name for entry in METHODS]
#: One of each kind: chooses; moves triplets; moves ranks of LoRA; trains what PEFT has, or a parametrisation of LoRA.
KINDS = ["selected", "increlora", "alora", "vera", "milora"]
STEPS, SAVED = 4, 2
#: Few steps before the training, and half of the parameters.
QUICK = {
    "parameters": 0.5,
    "steps": 2,
    "head_steps": 0,
    "rule": FirstOrder(head_steps=0),
    "progress": False,
    "deltaT": 1,
    "tfinal": 1,
    "interval": 1,
    "rounds": 2,
}


def quick(name, **changed):
    return {key: value for key, value in {**QUICK, **changed}.items() if key in options_of(name)}


# -- three architectures ---------------------------------------------------------------------------------------------


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)).to(torch.bfloat16)


def bart():
    sizes = {f"{half}_{size}": n for half in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, pad_token_id=0, **sizes, **heads))


@dataclass(frozen=True)
class Architecture:
    """A random model, plain LoRA on blocks of equally many sites, and how it is trained."""

    make: object
    lora: dict
    arguments: dict = field(default_factory=dict)
    #: What a number type rounds, as a share of what the adapters add to the logits.
    tolerance: float = 1e-4

    def base(self):
        torch.manual_seed(0)
        return self.make().eval()

    def trainer(self, folder, **changed):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **self.lora)
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "seed": 3}
        steps = {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
        arguments = TrainingArguments(str(folder), **{**quiet, **steps, **self.arguments, **changed})
        return Trainer(get_peft_model(self.base(), lora), arguments, train_dataset=self.rows())

    def rows(self):
        """Random words; of a sentence for a class the first word tells it, the others are to be written again."""
        tokens = torch.randint(3, 32, (64, 8), generator=torch.Generator().manual_seed(0)).tolist()
        ask_class = self.make is bert
        return [
            {"input_ids": row, "attention_mask": [1] * 8, "labels": row[0] % 2 if ask_class else row} for row in tokens
        ]

    def logits(self, model):
        model.eval()
        rows = self.rows()[:6]
        with torch.no_grad():
            return model(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}).logits


ARCHITECTURES = {
    "encoder": Architecture(bert, {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    # Also in half precision and with gradients of two batches a step.
    "decoder": Architecture(llama, {"task_type": "CAUSAL_LM"}, {"gradient_accumulation_steps": 2}, tolerance=5e-2),
    "encoder_decoder": Architecture(
        bart, {"task_type": "SEQ_2_SEQ_LM", "target_modules": r".*(self_attn\.(q|v)_proj|fc1)"}
    ),
}


# -- one run a method and architecture, which the tests look at ------------------------------------------------------


class Watch(TrainerCallback):
    """Notes after each optimizer step what the method holds and what it may hold."""

    def __init__(self, method):
        self.method, self.steps = method, []

    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002 - the Trainer decides
        step = state.global_step + 1
        self.steps.append((sum(self.method.plan.ranks.values()), self.method.most_ranks(step)))


@dataclass(frozen=True)
class Run:
    name: str
    architecture: Architecture
    folder: Path
    trainer: Trainer
    method: object
    steps: list
    begun: int
    """Steps that the method took before the trainer."""
    trained_logits: torch.Tensor
    logits_without: torch.Tensor
    exported: PeftModel
    looked: int
    """Most adapter parameters that an optimizer held before the training."""
    trained: int
    """Adapter parameters that the trainer was given."""
    peak: int
    """What a benchmark would report."""


def run(name, architecture, folder, checkpoint=None):
    trainer, peak = architecture.trainer(folder), Peak()
    head = sum(p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "modules_to_save" in n)
    with peak.watched():
        method = method_for(trainer, name, **quick(name))
    begun = method.begun.steps if method.begun else 0
    given = {n: p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad}
    looked, trained = max(0, peak.parameters - head), sum(given.values()) - head
    watch = Watch(method)
    trainer.add_callback(watch)
    with peak.watched():
        trainer.train(resume_from_checkpoint=checkpoint or bool(begun))
    strengthen(trainer.model, 300)
    logits = architecture.logits(trainer.model)
    with restored(trainer.model):
        strengthen(trainer.model, 0)
        without = architecture.logits(trainer.model)
    exported = method.export(trainer.model)
    exported.save_pretrained(str(folder / "adapter"))
    counts = (looked, trained, peak.parameters - head)
    return Run(name, architecture, folder, trainer, method, watch.steps, begun, logits, without, exported, *counts)


#: What an adapter's output grows with: B, or what B is made of.
LOUD = (r"lora_B\.default(\.weight|\.parametrizations\.weight\.original)?", "vera_lambda_b.*", "vblora_vector_bank.*")


@torch.no_grad()
def strengthen(model, factor):
    """After so few steps adapters hardly speak; what is exported shall be heard."""
    for name, parameter in model.named_parameters():
        if any(re.fullmatch(rf".*\.{part}", name) for part in LOUD):
            parameter.mul_(factor)


@contextmanager
def restored(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    yield
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


def runs(**names):
    """The fixture of the checks: a finished run of each method that is named for an architecture."""
    pairs = [(kind, name) for kind, own in names.items() for name in own]

    @pytest.fixture(scope="module", params=pairs, ids="-".join)
    def finished(request, tmp_path_factory):
        kind, name = request.param
        return run(name, ARCHITECTURES[kind], tmp_path_factory.mktemp(name))

    return finished


def saved(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_budget_is_held_at_every_step_and_spent_at_the_end(finished):
    assert len(finished.steps) == STEPS - finished.begun
    for ranks, budget in finished.steps:
        assert 0 < ranks <= budget
    plan = finished.method.plan
    whole = sum(entry.lora_r for entry in plan.entries)
    if not entry_of(finished.name).keeps_budget:  # the reference: full rank, which is min(in, out)
        assert plan.ranks == {e.site.name: min(e.site.in_features, e.site.out_features) for e in plan.entries}
        assert finished.method.most_ranks(STEPS) == sum(plan.ranks.values()) > whole
        return
    assert sum(plan.ranks.values()) <= finished.method.most_ranks(STEPS) <= whole
    if "parameters" in options_of(finished.name) or finished.name == "weightlora":  # half of the sites, all alike
        kept = sum(e.site.parameters(e.lora_r) for e in plan.entries if e.r)
        assert 0 < 2 * kept <= plan.lora_parameters
    else:
        assert sum(plan.ranks.values()) == whole


def test_the_export_is_the_same_object_with_the_same_logits(finished):
    assert finished.exported is finished.trainer.model
    after = finished.architecture.logits(finished.exported)
    added = (finished.trained_logits - finished.logits_without).abs().max()
    assert added > 1e-4, "the adapters are heard"
    assert (after - finished.trained_logits).abs().max() <= finished.architecture.tolerance * added


def test_what_is_saved_is_stock_lora_that_peft_loads(finished):
    config = json.loads((finished.folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == sorted(finished.method.plan.names)
    if entry_of(finished.name).trains != "lora":  # some runtimes read one alpha for all sites, as a whole number
        assert type(config["lora_alpha"]) is int
        assert config["alpha_pattern"] == {}
    loaded = PeftModel.from_pretrained(finished.architecture.base(), str(finished.folder / "adapter"))
    assert torch.equal(finished.architecture.logits(loaded), finished.architecture.logits(finished.exported))


def test_the_parameters_reported_are_those_in_the_file(finished):
    counted = sum(tensor.numel() for key, tensor in saved(finished.folder).items() if "lora_" in key)
    assert finished.method.plan.parameters == counted
    trained = [p for n, p in finished.exported.named_parameters(remove_duplicate=False) if "lora_" in n]
    assert all(p.requires_grad for p in trained)
    assert sum(p.numel() for p in trained) == counted


def test_the_parameters_at_the_peak_are_those_counted(finished):
    """Whoever trains while looking trains plain LoRA on all sites; then the trainer trains what it was given."""
    assert finished.looked in (0, finished.method.plan.lora_parameters)
    assert finished.peak == max(finished.looked, finished.trained)
    assert finished.trained > 0


def test_the_weights_of_the_base_are_untouched(finished):
    before = finished.architecture.base().state_dict()
    parts = {".base_layer": "", ".original_module": ""}
    now = {}
    for key, tensor in finished.exported.get_base_model().state_dict().items():
        for old, new in parts.items():
            key = key.replace(old, new)
        now[key] = tensor
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())


@pytest.mark.sampled(12)
def test_the_seed_decides(finished, tmp_path):
    starts = []
    for folder, noise in (("one", 5), ("two", 6)):
        trainer = finished.architecture.trainer(tmp_path / folder)
        torch.manual_seed(noise)  # what the global generators hold does not matter
        method = method_for(trainer, finished.name, **quick(finished.name))
        starts.append((method.plan, {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}))
    assert starts[0][0] == starts[1][0]
    assert same(starts[0][1], starts[1][1])


@pytest.mark.sampled(12)
def test_a_run_that_stopped_ends_as_one_that_did_not(finished):
    checkpoint = finished.folder / f"checkpoint-{SAVED}"
    again = run(finished.name, finished.architecture, finished.folder, checkpoint=str(checkpoint))
    assert len(again.steps) == STEPS - SAVED
    assert again.steps == finished.steps[SAVED - STEPS :]
    first, second = finished.exported, again.exported
    assert same(first.state_dict(), second.state_dict())


def test_what_is_exported_depends_on_the_last_checkpoint_alone(finished):
    """A run that was killed after its last checkpoint takes no step more."""
    checkpoint = finished.folder / f"checkpoint-{STEPS}"
    trainer = finished.architecture.trainer(finished.folder)
    method = method_for(trainer, finished.name, **quick(finished.name))
    set_peft_model_state_dict(trainer.model, load_file(checkpoint / "adapter_model.safetensors"))
    take_up(method.callbacks(), checkpoint, STEPS)
    strengthen(trainer.model, 300)
    assert same(method.export(trainer.model).state_dict(), finished.exported.state_dict())
    assert method.plan == finished.method.plan
