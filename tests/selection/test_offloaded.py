"""Models whose weights are not in memory: scored as the whole model is, one module at a time, and left as they were."""

import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from selecting import STUDY, fingerprint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from weightlora import select, select_for
from weightlora.errors import OptionError, SiteError, WeightLoraWarning
from weightlora.methods import METHODS
from weightlora.model.gathering import gathered
from weightlora.model.layers import lora_layers
from weightlora.selection.rules import RULES
from weightlora.trainer.attach import method_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*batches for.*scoring steps", "ignore:The following device_map keys", "ignore::FutureWarning"
)

BATCHES = [
    {
        "input_ids": torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(i)),
        "labels": torch.arange(4) % 2,
    }
    for i in range(4)
]
TEXTS = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in BATCHES]


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def partly(model, folder):
    """Every second module that has weights on the disk, the head among them; the others in memory."""
    leaves = [name for name, m in model.named_modules() if not [*m.children()] and [*m.parameters()]]
    places = {name: ("cpu", "disk")[i % 2] for i, name in enumerate(reversed(leaves), start=1)}
    places |= {name: "cpu" for name, _ in model.named_buffers()}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def on_disk(model, folder):
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def on_cpu(model, _folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def scored(model, rule="first_order", batches=BATCHES, task="SEQ_CLS", **options):
    lora = options.pop("lora", LoraConfig(r=2, task_type=task))
    return select(model, batches, lora=lora, rule=rule, **{"adapters": 4, "steps": 3, "progress": False, **options})


# -- the same plan ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rule", [*(entry.name for entry in RULES), *STUDY.values()])
def test_every_rule_scores_as_on_the_whole_model(rule, tmp_path):
    model = partly(bert(), tmp_path)
    before = fingerprint(model)
    plan = scored(model, rule)
    assert fingerprint(model) == before
    assert plan == scored(bert(), rule)  # bit for bit, and the order of the sites


@pytest.mark.sampled(3)
@pytest.mark.parametrize("place", [on_cpu, on_disk, partly])
@pytest.mark.parametrize("fast", [None, "input"])
def test_every_place_and_both_steps(place, fast, tmp_path):
    model = place(llama(), tmp_path)
    before = fingerprint(model)
    plan = scored(model, "paper", TEXTS, "CAUSAL_LM", fast=fast)
    assert fingerprint(model) == before
    assert plan == scored(llama(), "paper", TEXTS, "CAUSAL_LM", fast=fast)


def test_gradient_checkpointing(tmp_path):
    model = on_disk(llama(), tmp_path)
    model.gradient_checkpointing_enable()
    assert scored(model, batches=TEXTS, task="CAUSAL_LM") == scored(llama(), batches=TEXTS, task="CAUSAL_LM")


class Placed(TrainingArguments):
    """Those of a model with a ``device_map`` over several devices, which the Trainer leaves where it is."""

    place_model_on_device = property(lambda _: False)


def test_the_trainer_of_an_offloaded_model(tmp_path):
    def planned(model, name):
        arguments = Placed(str(tmp_path / name), max_steps=4, use_cpu=True, report_to="none", seed=1)
        rows = [{"input_ids": row, "labels": row} for batch in TEXTS for row in batch["input_ids"]] * 4
        trainer = Trainer(model, arguments, train_dataset=rows)
        return select_for(trainer, lora=LoraConfig(r=2, task_type="CAUSAL_LM"), adapters=4, steps=2), trainer.model

    (plan, model), (expected, _) = planned(on_disk(llama(), tmp_path / "d"), "a"), planned(llama(), "b")
    assert plan == expected
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)


def in_four_bits(folder, **options):
    llama().save_pretrained(folder)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **options}
    four = BitsAndBytesConfig(load_in_4bit=True, **options)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=four, device_map={"": "cpu"})


def test_four_bits(tmp_path):
    """The plan of the dequantised weights: what 4 bits compute, by torch's own product."""
    small, whole = in_four_bits(tmp_path), llama()
    for name, module in small.named_modules():
        if type(module).__name__ == "Linear4bit":
            whole.get_submodule(name).weight.data = dequantize_module_weight(module).detach().float()
    before = fingerprint(small)
    plan, expected = (scored(model, batches=TEXTS, task="CAUSAL_LM") for model in (small, whole))
    assert fingerprint(small) == before
    assert plan.names == expected.names
    assert plan.scores == pytest.approx(expected.scores, rel=1e-4)  # sums of 64 fp32 numbers in another order
    # Negative control: these are not the scores of the weights before they were rounded to 4 bits.
    unrounded = scored(llama(), batches=TEXTS, task="CAUSAL_LM").scores
    assert plan.scores != pytest.approx(unrounded, rel=1e-4)


def state_of(model):
    """The packed numbers of the 4-bit layers, with every value of their quantisation states."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    return [(layer.weight.data.numpy().tobytes(), *_values(layer.weight.quant_state)) for layer in layers]


def _values(state):
    for name, value in sorted(vars(state).items()):
        if isinstance(value, QuantState):
            yield from _values(value)
        else:
            yield name, (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.sampled(6)
@pytest.mark.parametrize("rule", [*(entry.name for entry in RULES), *STUDY.values()])
def test_no_rule_packs_four_bits_for_evaluation(rule, tmp_path):
    """On a processor with AVX512-BF16, bitsandbytes packs the weights of an evaluation pass and rounds their scales."""
    model = in_four_bits(tmp_path, bnb_4bit_use_double_quant=True).train()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as it is set there; packing itself runs on any processor
    before, attributes, logits = state_of(model), fingerprint(model), model(**TEXTS[0]).logits
    scored(model, rule, TEXTS, "CAUSAL_LM")
    assert fingerprint(model) == attributes
    assert state_of(model) == before
    assert torch.equal(model(**TEXTS[0]).logits, logits)
    with suppress(RuntimeError), torch.no_grad():  # the processor may lack the kernel for packed weights
        model.eval()(**TEXTS[0])
    assert state_of(model) != before  # negative control
    with pytest.raises(SiteError, match=r"packed by bitsandbytes .*load the model again"):
        scored(model, rule, TEXTS, "CAUSAL_LM")


# -- memory ----------------------------------------------------------------------------------------------------------


class Shelf(Mapping):
    """Weights that are copied each time they are read; ``most`` is the most bytes of copies that existed at once."""

    def __init__(self, weights):
        self.weights, self.now, self.most = weights, 0, 0

    def __getitem__(self, name):
        array = self.weights[name].numpy().copy()  # alive as long as any tensor uses its memory
        self.count(array.nbytes)
        weakref.finalize(array, self.count, -array.nbytes)
        return torch.from_numpy(array)

    def count(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def test_one_module_at_a_time_is_in_memory():
    whole = llama()
    shelf = Shelf(whole.state_dict())
    model = cpu_offload(llama(), execution_device=torch.device("cpu"), state_dict=shelf)
    matrix = 64 * 64 * 4  # every matrix of this model, of its 3·7 linear layers, the embedding and the head
    plan = scored(model, "integrated", TEXTS, "CAUSAL_LM")
    assert plan == scored(whole, "integrated", TEXTS, "CAUSAL_LM")
    assert matrix <= shelf.most <= 2 * matrix
    assert shelf.now == 0
    # Negative control: by itself autograd keeps them, all but those below the lowest adapter.
    attached = plan.attach(model)
    attached(**TEXTS[0]).loss.backward()
    assert shelf.most > 5 * matrix
    with gathered(attached):
        attached(**TEXTS[0]).loss.backward()


# -- adapters on an offloaded model ----------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", [on_cpu, on_disk, partly])
def test_attached_adapters_are_trained_and_saved_as_on_the_whole_model(place, tmp_path):
    plan = scored(bert())
    adapted = []
    for model in (place(bert(), tmp_path / "weights"), bert()):
        torch.manual_seed(5)
        attached = plan.attach(model).eval()
        optimizer = torch.optim.SGD([p for p in attached.parameters() if p.requires_grad], lr=0.1)
        for batch in BATCHES:
            attached(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.append(attached)
    offloaded, whole = adapted
    trained = {name: p for name, p in offloaded.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    assert len(trained) == 2 * 4 + 2
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(trained[name], parameter)
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(offloaded).values())
    offloaded.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**BATCHES[0]).logits, whole(**BATCHES[0]).logits)
    # What was attached and not trained is scored again, and replaced: the object stays.
    fresh = plan.attach(place(bert(), tmp_path / "more"))
    assert scored(fresh, lora=None).names == plan.names
    assert plan.attach(fresh) is fresh


@pytest.mark.parametrize("field", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_adapters_that_read_the_weights_are_refused(field, tmp_path):
    model, lora = partly(bert(), tmp_path), LoraConfig(r=2, task_type="SEQ_CLS", **field)
    name = next(iter(field))
    with pytest.warns(WeightLoraWarning, match=rf"attach will refuse this model: {name}=.* reads the base"):
        plan = scored(model, lora=lora)
    before = fingerprint(model)
    with pytest.raises(OptionError, match=rf"^{name}=\S+ reads the base weights, which are offloaded; .*{name} out$"):
        plan.attach(model)
    assert fingerprint(model) == before
    plan.attach(bert())


# -- what is refused, in one line and before anything runs -----------------------------------------------------------


def never(_model, _batch):
    raise AssertionError("the model ran")


@pytest.mark.parametrize(("limit", "told"), [({"memory": "8GB"}, "memory='8GB'"), ({"time": 0.8}, "time=0.8")])
def test_budgets_that_are_measured(limit, told, tmp_path):
    text = rf"^adapters=4, .*{told} is measured on a step, and this model's weights are .*$"
    with pytest.raises(OptionError, match=text):
        scored(on_disk(bert(), tmp_path), **limit, loss_fn=never)


@pytest.mark.parametrize("name", [entry.name for entry in METHODS if entry.trains != "lora"])
def test_methods_that_train_other_numbers(name, tmp_path):
    arguments = Placed(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    trainer = Trainer(on_disk(bert(), tmp_path), arguments, train_dataset=[{"input_ids": [1], "labels": 0}] * 8)
    with pytest.raises(OptionError, match=r"load the model without offloading$"):
        method_for(trainer, name, lora=LoraConfig(r=2, task_type="SEQ_CLS"))


def test_modules_that_are_loaded_with_those_above_them():
    model = cpu_offload(bert(), execution_device=torch.device("cpu"), preload_module_classes=["BertSelfAttention"])
    with pytest.raises(OptionError, match=r"^\S+self is offloaded as a whole .* leave preload_module_classes out$"):
        scored(model, loss_fn=never)


def test_weights_that_nothing_loads():
    with torch.device("meta"):
        model = bert()
    with pytest.raises(SiteError, match=r"^bert\S+weight \(.*\) is on the meta device and nothing loads it: "):
        scored(model, loss_fn=never)


# -- ZeRO-3 ----------------------------------------------------------------------------------------------------------


class Gathered:
    """A stand-in for ``deepspeed.zero.GatheredParameters``; ``.ci/zero3`` runs the real one in two processes."""

    now = most = 0

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for p in self.parameters:
            p.data = p.ds_tensor.clone()
        Gathered.now += sum(p.nbytes for p in self.parameters)
        Gathered.most = max(Gathered.most, Gathered.now)

    def __exit__(self, *_):
        Gathered.now -= sum(p.nbytes for p in self.parameters)
        empty(self.parameters)


def empty(parameters):
    for p in parameters:
        p.data = torch.empty(0)


def partitioned(model):
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_tensor = i, p.data
    empty(model.parameters())
    return model


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "rule",
    [
        *("first_order", "pursuit", "integrated", "kappa_tune"),
        *(STUDY[name] for name in ("relative_gradient", "gora", "plop")),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_partitioned_weights_are_gathered_for_each_module(rule, checkpointed, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered)))
    model, whole = partitioned(llama()), llama()
    for net in (model, whole):
        if checkpointed:
            net.gradient_checkpointing_enable()
    before = fingerprint(model)
    assert scored(model, rule, TEXTS, "CAUSAL_LM") == scored(whole, rule, TEXTS, "CAUSAL_LM")
    assert fingerprint(model) == before
    assert (Gathered.now, Gathered.most) == (0, 64 * 64 * 4)  # never two modules' at once
