"""Projections come in the order in which a block runs them, whatever the family calls them."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PhiConfig,
    PhiModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5Model,
)
from transformers.pytorch_utils import Conv1D

from weightlora.model.sites import Site
from weightlora.plan.heatmap import ordered_projections, projection_key, projection_role

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
LLAMA = {**SMALL, "num_key_value_heads": 2}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "deberta": lambda: DebertaV2Model(DebertaV2Config(**DEBERTA, max_relative_positions=8)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=20)
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**LLAMA)),
    "qwen": lambda: Qwen3Model(Qwen3Config(**LLAMA, head_dim=8)),
    "phi": lambda: PhiModel(PhiConfig(**SMALL)),
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)),
    "t5": lambda: T5Model(T5Config(**T5)),
    "t5 gated": lambda: T5Model(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bart": lambda: BartModel(BartConfig(**BART)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_order_is_that_of_the_forward_pass(name):
    model = MODELS[name]().eval()
    called: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        site = Site(path, 1, 1)
        if isinstance(module, (nn.Linear, Conv1D)) and site.block:
            module.register_forward_pre_hook(
                lambda _m, _i, site=site: called.setdefault(site.block, []).append(site.projection)
            )
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    assert called
    for projections in called.values():
        in_order = list(dict.fromkeys(projections))
        # DeBERTa and BART compute some of query, key and value in another order than q, k, v, which all are shown in.
        assert [part(p) for p in ordered_projections(in_order)] == [part(p) for p in in_order]
        assert all(projection_key(p)[0] < 3 for p in in_order)


def part(projection: str) -> tuple[int, int]:
    """Attention or MLP, and before or after its heads: query, key and value are one stage."""
    kind, place, _ = projection_key(projection)
    return kind, place if kind == 2 else int(place == 7)


def test_query_key_value_output():
    for names in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
        ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
        ["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.0.SelfAttention.o"],
        ["self_attn.q_proj", "self_attn.out_proj", "encoder_attn.q_proj", "encoder_attn.out_proj", "fc1", "fc2"],
        ["attn.c_attn", "attn.c_proj", "crossattention.c_attn", "crossattention.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ["moe.experts.0.w1", "moe.experts.0.w3", "moe.experts.0.w2"],
        ["q_proj", "v_proj", "up_proj", "down_proj"],
    ):
        assert ordered_projections(reversed(names)) == names


def test_unknown_names_follow_by_the_alphabet():
    names = ["zeta", "mlp.down_proj", "alpha", "dense", "pooler.dense", "self_attn.q_proj"]
    assert ordered_projections(names) == ["self_attn.q_proj", "mlp.down_proj", "alpha", "dense", "pooler.dense", "zeta"]


@pytest.mark.parametrize(
    ("projection", "role"),
    [
        *(("attention.self.value", "value"), ("attention.output.dense", "output"), ("output.dense", "down")),
        *(("attn.c_attn", "qkv"), ("attn.c_proj", "output"), ("mlp.c_proj", "down"), ("mlp.c_fc", "up")),
        *(("layer.0.SelfAttention.v", "value"), ("layer.0.SelfAttention.o", "output")),
        *(("layer.1.EncDecAttention.v", "value"), ("layer.2.DenseReluDense.wo", "down")),
        *(("layer.1.DenseReluDense.wi_0", "gate"), ("self_attn.q_proj", "query"), ("v_proj", "value")),
    ],
)
def test_roles_of_projections_of_other_models(projection, role):
    assert projection_role(projection)[1] == role
