"""What each floor takes, from a configuration alone: bytes by shapes, time by the formula."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from weightlora.cost.empty_model import make_empty_model, make_loss_of
from weightlora.cost.floors import compare_floors
from weightlora.cost.memory import Setting
from weightlora.errors import OptionError

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
