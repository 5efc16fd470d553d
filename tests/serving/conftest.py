import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_adapters import LAYERS, SHAPES, Saved, base_model, logits
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def save(base, tmp_path_factory):
    """Save an adapter with random A and B, and return it with its logits."""

    def make(**fields) -> Saved:
        lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, **fields})
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(base_model(base), lora)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return Saved(folder, base, logits(base, folder))

    return make


@pytest.fixture(scope="session", params=SHAPES)
def adapter(request, save):
    return save(**SHAPES[request.param])
