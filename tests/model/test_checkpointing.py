"""Under gradient checkpointing the backward pass ends at the lowest adapter, and the gradients are the same."""

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from weightlora.errors import WeightLoraWarning
from weightlora.model.checkpointing import remove_input_hooks, shorten_backward
from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.trainer.attach import adopt

LAYERS, LOWEST = 4, 2
TOKENS = torch.arange(24).reshape(2, 12)
ALL, ABOVE = list(range(LAYERS)), list(range(LOWEST, LAYERS))
REENTRANT = {"use_reentrant": True}


def llama(vocabulary=64):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": vocabulary}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes))


def upper_plan(model):
    """Adapters in the upper two of four layers."""
    lora = LoraConfig(r=2, task_type="CAUSAL_LM")
    sites = find_sites(model, lora).sites
    return make_plan(sites, lora, [site.name for site in sites if int(site.block[-1]) >= LOWEST])


def watch(model) -> Callable[[], list[int]]:
    """What it returns says which layers' outputs had a gradient since: those that ran backward."""
    ran = set()

    def watch_output(number, output):
        if output.requires_grad:
            output.register_hook(lambda _: ran.add(number))

    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda _, __, output, number=number: watch_output(number, output))
    return lambda: sorted(ran)


def gradients(model):
    """Those of the adapters, and the layers that ran backward for them."""
    layers = watch(model)
    model.zero_grad()
    torch.manual_seed(0)
    model(TOKENS, labels=TOKENS).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == 2 * len(upper_plan(llama()).names)
    return found, layers()


def test_the_backward_pass_ends_at_the_lowest_adapter_and_no_gradient_changes():
    model = upper_plan(llama()).attach(llama(), init_lora_weights=False).train()
    plain, layers = gradients(model)
    assert layers == ABOVE
    model.activation_checkpointing_enable()
    hooked, layers = gradients(model)
    assert layers == ALL  # transformers' own way, in which the selection saves nothing
    shorten_backward(model)
    short, layers = gradients(model)
    assert layers == ABOVE
    assert all(map(torch.equal, short, hooked))
    assert all(map(torch.equal, short, plain))


def test_hooks_set_twice_go_and_those_of_others_stay():
    model = llama()
    for _ in range(2):  # as TRL and transformers do together, after which transformers takes off the last one alone
        model.enable_input_require_grads()
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: None)
    model.disable_input_require_grads()
    assert len(model.model.embed_tokens._forward_hooks) == 2
    assert remove_input_hooks(model)
    assert list(model.model.embed_tokens._forward_hooks) == [handle.id]
    model.disable_input_require_grads()  # as ever


def test_attach_takes_off_what_a_script_has_enabled():
    base = llama()
    base.activation_checkpointing_enable()
    assert gradients(upper_plan(base).attach(base).train())[1] == ABOVE


def test_reentrant_checkpointing_keeps_the_hooks_that_it_needs():
    base = llama()
    base.activation_checkpointing_enable(REENTRANT)
    with pytest.warns(WeightLoraWarning, match="reentrant here.*'use_reentrant': False"):
        model = upper_plan(base).attach(base, init_lora_weights=False).train()
    found, layers = gradients(model)
    assert layers == ALL
    model.activation_checkpointing_disable()
    assert all(map(torch.equal, found, gradients(model)[0]))
    model.activation_checkpointing_enable({"preserve_rng_state": True})  # torch's own default, whichever it is
    assert not remove_input_hooks(model)


class Watch(TrainerCallback):
    """Notes which layers run backward in the training."""

    def on_train_begin(self, *_, model, **__):
        self.layers = watch(model)


QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "bf16": False}
FEW = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
ROWS = [{"prompt": f"{n} and one", "chosen": f" is {n + 1}", "rejected": " is what"} for n in range(8)]


def trainer(kind, model, folder, **more):
    arguments = {"output_dir": str(folder), **QUIET, **FEW, "gradient_checkpointing": True, **more}
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()), eos_token="[SEP]")
    if kind is Trainer:
        rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()] * 4
        return Trainer(model, TrainingArguments(**arguments), train_dataset=rows)
    config = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig}[kind](max_length=32, **arguments)
    rows = ROWS if kind is DPOTrainer else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    return kind(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [Trainer, SFTTrainer, DPOTrainer])
def test_trainers_that_switch_it_on_again_are_seen_to(kind, tmp_path):
    base = llama(vocabulary=30522)
    plan, watching = upper_plan(base), Watch()
    planned = trainer(kind, plan.attach(base), tmp_path)
    adopt(planned, plan, seed=0)
    planned.add_callback(watching)
    planned.train()
    assert watching.layers() == ABOVE

    control = trainer(kind, plan.attach(llama(vocabulary=30522)), tmp_path / "control")
    control.add_callback(watching)
    control.train()
    assert watching.layers() == ALL


def test_a_trainer_with_reentrant_checkpointing_is_told(tmp_path):
    base = llama()
    plan = upper_plan(base)
    planned = trainer(Trainer, plan.attach(base), tmp_path, gradient_checkpointing_kwargs=REENTRANT)
    adopt(planned, plan, seed=0)
    with pytest.warns(WeightLoraWarning, match="reentrant here") as told:
        planned.train()
    assert len([one for one in told if one.category is WeightLoraWarning]) == 1
