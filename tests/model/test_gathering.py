"""Models without values, or made under inference mode, are refused before anything is touched."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import weightlora
from weightlora.errors import SiteError
from weightlora.model.gathering import require_loaded

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
BATCHES = [{key: torch.tensor([value]) for key, value in ROWS[0].items()}] * 2


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))


def on_meta():
    with torch.device("meta"):
        return llama()


def partly_on_meta():
    """As a model is whose last layers were offloaded."""
    model = llama()
    model.model.norm.to("meta")
    return model


def under_inference_mode():
    with torch.inference_mode():
        return llama()


UNUSABLE = pytest.mark.parametrize(
    ("make", "says"),
    [
        (on_meta, r"model.embed_tokens.weight \(\d+ of \d+ weights\) is on the meta device.* load the model's"),
        (partly_on_meta, r"model.norm.weight \(1 of \d+ weights\) is on the meta device"),
        (under_inference_mode, r"model.embed_tokens.weight .* torch.inference_mode\(\).* load the model outside"),
    ],
    ids=["meta", "partly meta", "inference mode"],
)


def state_of(model):
    """All but the values, which a tensor on meta lacks."""
    parameters = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return list(model.named_modules()), parameters, torch.get_rng_state().tolist()


def refused(model, says, call):
    before = state_of(model)
    with pytest.raises(SiteError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert state_of(model) == before


@UNUSABLE
@pytest.mark.parametrize("wrapped", [False, True], ids=["base", "PEFT"])
def test_select_and_attach_refuse_it(make, says, wrapped):
    plan = weightlora.select(llama(), BATCHES, lora=LORA, adapters=1, steps=2, progress=False)
    model = get_peft_model(make(), LORA) if wrapped else make()
    refused(model, says, lambda: weightlora.select(model, BATCHES, adapters=1, steps=2, progress=False))
    refused(model, says, lambda: plan.attach(model))


@UNUSABLE
@pytest.mark.parametrize("method", ["selected", "random", "adalora", "eva"])
def test_a_trainer_with_it_is_refused(make, says, method, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(llama(), arguments, train_dataset=ROWS)
    # A Trainer does not take such a model to its device; one that places it itself, as with device_map, has it later.
    trainer.model = trainer.model_wrapped = model = make()
    refused(model, says, lambda: weightlora.method_for(trainer, method, lora=LORA))
    assert not (tmp_path / "plan.json").exists()


def test_a_buffer_of_inference_mode_is_refused_where_a_scoring_computes_with_it():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    options = {"adapters": 1, "steps": 2, "loss_fn": loss, "progress": False}
    batches = [{"x": torch.linspace(-1, 1, 32).reshape(8, 4)}] * 2
    plan = weightlora.select(net, batches, **options)
    with torch.inference_mode():
        net[1].running_mean = torch.zeros(4)
    with pytest.raises(SiteError, match=r"1\.running_mean"):
        weightlora.select(net, batches, **options)
    plan.check(plan.attach(net))  # what is trained then is not concerned


def loss(model, batch):
    return (model(batch["x"]) - 1).square().mean()


def test_what_a_hook_loads_is_no_fault():
    require_loaded(cpu_offload(llama(), execution_device="cpu"), computes=True)
