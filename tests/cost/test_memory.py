"""Memory from a config alone: against what the CPU's allocator counts, against closed forms, and in one line if not."""

import sys
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from weightlora.cost.empty_model import make_empty_model, make_loss_of, quantisation_tensors, quantise
from weightlora.cost.estimate import compare_floors, compare_memory
from weightlora.cost.memory import Setting, count_step, optimizer_bytes
from weightlora.errors import OptionError, SelectionError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "paper" / "configs"
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
LENGTH = 6


@pytest.fixture(scope="module")
def benchmark():
    spec = spec_from_file_location("benchmarks_memory", ROOT / "benchmarks" / "memory.py")
    module = sys.modules[spec.name] = module_from_spec(spec)  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def llama(**changed):
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changed}))


def loss(model, rows):
    tokens = torch.ones((rows, LENGTH), dtype=torch.long, device="meta")
    return model(input_ids=tokens, labels=tokens).loss


def is_counted(estimate, configuration, benchmark):
    """Whether the allocator counts as much. The profiler loses an event now and then: the largest of three counts."""
    most = 0
    for _ in range(3):
        most = max(most, benchmark.counted(configuration))
        if most > 0.99 * estimate:  # no large event is lost
            break
    return estimate == pytest.approx(most, rel=0.005)


def with_lora(model, **lora):
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **lora))


# -- the whole step ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", [2, 6, 8, 9])
def test_peaks_are_those_that_the_allocator_counts(number, benchmark):
    """Checkpointing, grouped attention under adapters in the upper half, 4 bit twice quantised, and fused experts."""
    configuration = replace(benchmark.TEN[number], length=48)
    assert is_counted(benchmark.estimated(configuration), configuration, benchmark)


@pytest.mark.slow
def test_a_wrong_setting_is_far_from_the_count(benchmark):
    """Negative control: with adapters on all layers, or without checkpointing, the number is another one."""
    half, checkpointed = benchmark.TEN[6], benchmark.TEN[2]
    without = replace(checkpointed, setting=Setting(rows=8, optim="adamw_torch_fused", device="cpu"))
    for configuration, other in ((half, replace(half, method="LoRA")), (checkpointed, without)):
        assert benchmark.estimated(other) > 1.1 * benchmark.estimated(configuration)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_optimizers_step_is_the_peak(optim, dtype, benchmark):
    """One row of eight tokens: weights, gradients, state, and what the step makes for a moment."""
    setting = Setting(rows=1, optim=optim, device="cpu")
    configuration = benchmark.Configuration("Llama", "full", setting, dtype, length=8)
    assert is_counted(benchmark.estimated(configuration), configuration, benchmark)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_count_tells_the_memory_of_any_batch(rows, checkpointing):
    setting = Setting(rows=4, gradient_checkpointing=checkpointing)
    counted = count_step(with_lora(llama(), lora_dropout=0.1), loss, setting, any_rows=True)
    other = Setting(rows=rows, gradient_checkpointing=checkpointing)
    recounted = count_step(with_lora(llama(), lora_dropout=0.1), loss, other).memory()
    told = counted.memory(rows)
    assert told.saved == recounted.saved
    assert told.peak == pytest.approx(recounted.peak, rel=0.01 if rows == 1 else 0)  # a single row is not copied


def test_the_largest_batch_fits_and_one_more_row_does_not():
    step = count_step(with_lora(llama()), loss, Setting(rows=3), any_rows=True)
    limit = 2_000_000
    most = step.largest_batch(limit)
    assert step.memory(most).peak <= limit < step.memory(most + 1).peak
    assert step.largest_batch(step.memory(1).peak - 1) == 0
    with pytest.raises(OptionError, match="any_rows=True"):
        count_step(with_lora(llama()), loss, Setting(rows=3)).largest_batch(limit)


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_state_are_closed_forms():
    """A and B of four layers' q_proj (16 → 16) and down_proj (24 → 16) in fp32; the base's parameters besides."""
    model = llama()
    base = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    adapters = 4 * 4 * (16 + 16 + 24 + 16)
    memory = count_step(with_lora(llama()), loss, Setting(rows=2, device="cpu")).memory()
    assert memory.trained == adapters
    assert memory.weights == 4 * (base + adapters)
    assert memory.gradients == 4 * adapters
    assert memory.optimizer == 2 * 4 * adapters + 4 * 16  # a counter of steps for each of 16 matrices


def test_dropout_saves_a_byte_a_value_on_a_gpu_and_four_on_a_cpu():
    def saved(device):
        with torch.device("meta"):
            net = nn.Sequential(nn.Linear(8, 1024), nn.Dropout(0.1), nn.Linear(1024, 1))
        made = partial(torch.ones, (64, 8), device="meta")
        return count_step(net, lambda model, _: model(made()).sum(), Setting(rows=64, device=device)).memory().saved

    assert saved("cpu") - saved("cuda") == 64 * 1024 * (4 - 1)


def test_logits_are_a_part_of_their_own():
    """The loss holds the logits, and log-softmax in fp32 twice: for itself and, in the backward pass, as a gradient."""
    small, large = (count_step(llama(vocab_size=n), loss, Setting(rows=8, device="cpu")).memory() for n in (50, 5050))
    tokens = 8 * LENGTH
    assert large.saved == small.saved
    assert large.logits - small.logits == pytest.approx(3 * 4 * tokens * 5000, rel=0.02)


def test_shards_share_weights_gradients_and_state_and_gather_two_blocks():
    one = count_step(llama(), loss, Setting(rows=2, device="cpu")).memory()
    four = count_step(llama(), loss, Setting(rows=2, shards=4, device="cpu")).memory()
    block = 4 * sum(p.numel() for p in llama().model.layers[0].parameters())
    outside = 4 * sum(p.numel() for n, p in llama().named_parameters() if ".layers." not in n)
    buffer = one.weights - 4 * block - outside
    assert four.weights == one.weights // 4 + 2 * outside + buffer + 3 * block  # with their gradients
    assert (four.gradients, four.optimizer) == (one.gradients // 4, one.optimizer // 4)
    assert four.saved == one.saved


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_weights_take_what_bitsandbytes_stores(double):
    """Half a byte a weight; a scale for 64 weights; 16 levels. Twice: scales of a byte, theirs for 256, 256 levels."""
    numbers, scales = 512 * 256, 512 * 256 // 64
    expected = numbers // 2 + (scales + 4 * (scales // 256) + 4 * 256 + 4 if double else 4 * scales) + 4 * 16
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 3))
    quantise(net, 4, ["1"], double=double)
    weight = net[0].weight
    assert sum(t.untyped_storage().nbytes() for t in (weight, *quantisation_tensors(weight))) == expected
    assert net[1].weight.dtype == torch.float32  # spared

    from bitsandbytes.nn import Linear4bit

    real = Linear4bit(256, 512, bias=False, compress_statistics=double, quant_type="nf4").to("cpu")
    assert real.weight.quant_state is not None
    counted = sum(t.untyped_storage().nbytes() for t in (real.weight, *quantisation_tensors(real.weight)))
    assert counted == expected


def test_8_bit_weights_take_a_byte_and_a_scale_a_row():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 3))
    quantise(net, 8, ["1"])
    weight = net[0].weight
    assert sum(t.untyped_storage().nbytes() for t in (weight, *quantisation_tensors(weight))) == 256 * 512 + 4 * 512


def test_the_state_of_8_bit_adamw_is_bitsandbytes_own():
    from bitsandbytes.optim import AdamW8bit

    trained = [nn.Parameter(torch.randn(300, 257)), nn.Parameter(torch.randn(100))]
    optimizer = AdamW8bit(trained, lr=1e-3)
    sum(p.sum() for p in trained).backward()
    optimizer.step()
    states = [value for p in trained for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in states}  # the levels are shared
    assert optimizer_bytes("adamw_8bit", trained, "cpu").state == sum(storages.values())


def test_the_lowest_site_decides_what_is_saved():
    lines = compare_memory(llama, loss, LoraConfig(r=4), Setting(rows=8), limit=10**7)
    by_name = {}
    for line in lines:
        by_name.setdefault(line.name, []).append(line)
    assert [line.sites for line in lines] == [None, 28, 14, 14, 7, 7, 2, 2, 14, 14]
    (lora,) = by_name["LoRA"]
    for upper, lower in zip(by_name["WeightLoRA upper"], by_name["WeightLoRA lower"], strict=True):
        assert upper.memory.saved < 0.7 * lower.memory.saved < 0.7 * lora.memory.saved
        assert upper.largest_batch > lower.largest_batch > lora.largest_batch
    for plus in (*by_name["WeightLoRA+ upper"], *by_name["WeightLoRA+ lower"]):
        assert 0.8 * lora.memory.trained < plus.memory.trained <= lora.memory.trained


def test_a_model_that_asks_for_numbers_is_refused():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, device="meta")

        def forward(self, x):
            return self.layer(x)[: int(x.sum().item())].sum()

    with pytest.raises(SelectionError, match=r"Asks does not run without numbers: .*meta"):
        count_step(Asks(), lambda model, rows: model(torch.ones(rows, 4, device="meta")), Setting(rows=2))


# -- published sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "parameters"),
    [
        ("deberta-v3-base", 72, 184e6),
        ("bart-large", 192, 406e6),
        ("llama-3-8b", 224, 8.03e9),
        ("qwen3-8b", 252, 8.19e9),
        ("llama-3.1-70b", 560, 70.55e9),
        ("qwen3-30b-a3b", 192, 30.53e9),
    ],
)
def test_the_published_configs_have_the_published_sizes(name, n, parameters):
    """12 · 6, 12 · 6 + 12 · 10, 32 · 7, 36 · 7, 80 · 7, and 48 · 4: experts are no candidates."""
    from weightlora.model.sites import find_sites

    config = transformers.AutoConfig.from_pretrained(str(CONFIGS / f"{name}.json"))
    loader = {
        "deberta-v3-base": transformers.AutoModelForSequenceClassification,
        "bart-large": transformers.AutoModelForSeq2SeqLM,
    }
    with torch.device("meta"):
        model = loader.get(name, transformers.AutoModelForCausalLM).from_config(config)
    task = "SEQ_CLS" if name.startswith("deberta") else None
    assert len(find_sites(model, LoraConfig(task_type=task)).sites) == n
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.005)


# -- what each floor takes: bytes by shapes, time by the formula -----------------------------------------------------

WIDE, INNER, WORDS, BLOCKS = 32, 64, 512, 6
CONFIG = {"hidden_size": WIDE, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
#: Four square layers and three of the MLP.
PRODUCTS = 4 * WIDE * WIDE + 3 * WIDE * INNER


def lines_of(*, shards=1, epochs=3, tokens=1000):
    config = LlamaConfig(**CONFIG, vocab_size=WORDS, tie_word_embeddings=False)
    return compare_floors(
        lambda: make_empty_model(config, "CAUSAL_LM", dtype=torch.bfloat16),
        make_loss_of("CAUSAL_LM", 16, "meta"),
        LoraConfig(r=2, task_type="CAUSAL_LM"),
        Setting(4, shards=shards, device="cpu"),
        tokens=tokens,
        epochs=epochs,
    )


def test_floors_are_counted_from_shapes():
    whole, *floors = lines = lines_of()
    block = 2 * (PRODUCTS + 2 * WIDE)  # with two norms, in two bytes
    assert [line.sites for line in lines] == [7 * (BLOCKS - k) for k in range(6)]
    assert [line.offloaded for line in lines] == [k * block for k in range(6)]
    assert [line.store for line in lines] == [0, *[1000 * WIDE * 2] * 5]
    adapter = whole.memory.trained // BLOCKS * 4  # float32
    for k, line in enumerate(floors, start=1):
        assert whole.memory.weights - line.memory.weights == k * (block + adapter)
        assert line.memory.saved < whole.memory.saved
        assert whole.memory.peak - line.memory.peak > k * block


@pytest.mark.parametrize("epochs", [1, 3])
def test_time_is_the_formula_with_the_head_on_top(epochs):
    """The head's products forward and backward are in every epoch; with one epoch only the backward pass is saved."""
    head = WIDE * WORDS
    every = epochs * 2 * (BLOCKS * PRODUCTS + head)
    for k, line in enumerate(lines_of(epochs=epochs)):
        taken = epochs * 2 * ((BLOCKS - k) * PRODUCTS + head) + k * PRODUCTS
        assert line.time == pytest.approx(taken / every)


def test_a_model_in_parts_is_refused():
    with pytest.raises(OptionError, match="--fsdp or --store"):
        lines_of(shards=2)
