from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from weightlora.errors import SiteError
from weightlora.model.sites import Site, find_sites, linear_sites, trained_modules

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 2}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL))


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(RobertaConfig(**SMALL))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_inner=24))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


class Attending(nn.Module):
    """Torch's own attention, which reads its out_proj's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.attention(x, x, x)[0])


def names(model, lora=None) -> list[str]:
    return [site.name for site in find_sites(model, lora).sites]


def reasons(model, lora=None) -> dict[str, str]:
    return {skip.name: skip.reason for skip in find_sites(model, lora).skipped}


def adapted(model, lora) -> list[str]:
    """What PEFT really adapts."""
    base = get_peft_model(model, lora).get_base_model()
    return sorted(name for name, module in base.named_modules() if isinstance(module, LoraLayer))


# -- what is found ---------------------------------------------------------------------------------------------------


def test_minilm_has_36_sites_and_keeps_pooler_and_head_out(minilm):
    sites = find_sites(minilm).sites
    # 6 layers of query, key, value, attention output, and the two layers of the feed-forward net
    assert len(sites) == 6 * 6
    assert {site.block for site in sites} == {f"bert.encoder.layer.{i}" for i in range(6)}
    assert sum(site.parameters(1) for site in sites) == 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    skipped = reasons(minilm)
    assert skipped.keys() == {"bert.pooler.dense", "classifier"}
    assert skipped["bert.pooler.dense"].startswith("pooler")
    assert skipped["classifier"] == "output head"
    assert reasons(minilm, LoraConfig(task_type="SEQ_CLS"))["classifier"].startswith("trained whole")


def deberta_v3_base():
    config = DebertaV2Config(
        vocab_size=128_100,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )
    return DebertaV2ForSequenceClassification(config)


def llama_3_8b():
    shape = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128_256, num_key_value_heads=8, **shape))


def qwen3_8b():
    shape = {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, **shape))


DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("build", "targets", "count", "skipped"),
    [
        (deberta_v3_base, None, 12 * 6, {"pooler.dense", "classifier"}),
        (deberta_v3_base, ["query_proj", "key_proj", "value_proj"], 12 * 3, None),
        (llama_3_8b, None, 32 * 7, {"lm_head"}),
        (qwen3_8b, None, 36 * 7, {"lm_head"}),
        (qwen3_8b, [*DECODER, "lm_head"], 36 * 7 + 1, set()),
    ],
)
def test_full_size_models_have_the_sites_of_the_paper(build, targets, count, skipped):
    with torch.device("meta"):  # shapes without memory
        model = build()
    found = find_sites(model, LoraConfig(target_modules=targets))
    assert len(found.sites) == count
    if skipped is not None:
        assert {skip.name for skip in found.skipped} == skipped
    assert len(found.sites) + len(found.skipped) == len(linear_sites(model))


@pytest.mark.parametrize("build", [llama, bert, gpt2, t5])
def test_sites_and_skipped_part_all_linear_layers_and_are_sorted(build):
    found = find_sites(build())
    sites, skipped = [site.name for site in found.sites], [skip.name for skip in found.skipped]
    assert sites == sorted(sites)
    assert skipped == sorted(skipped)
    assert sorted(sites + skipped) == [site.name for site in linear_sites(build())]


@pytest.mark.parametrize("build", [llama, bert, gpt2])
def test_a_site_costs_what_peft_makes_trainable(build):
    sites = find_sites(build()).sites
    model = get_peft_model(build(), LoraConfig(r=3, target_modules=[site.name for site in sites]))
    assert sum(site.parameters(3) for site in sites) == model.get_nb_trainable_parameters()[0]


def test_gpt2s_transposed_layers_have_their_shape_the_right_way_round():
    shapes = {site.projection: (site.in_features, site.out_features) for site in find_sites(gpt2()).sites}
    assert shapes == {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 24), "mlp.c_proj": (24, 16)}


def test_the_inside_of_multihead_attention_is_no_site_because_an_adapter_there_does_nothing():
    assert names(Attending()) == ["linear"]
    assert "never calls it" in reasons(Attending())["attention.out_proj"]
    with pytest.raises(SiteError):
        find_sites(Attending(), LoraConfig(target_modules=["out_proj"]))
    for target, matters in (("out_proj", False), ("linear", True)):
        model, x = Attending(), torch.ones(1, 3, 8)
        before = model(x)
        # init_lora_weights=False: B is not 0, so an adapter that is called changes the output
        after = get_peft_model(model, LoraConfig(target_modules=[target], init_lora_weights=False))(x)
        assert (not torch.allclose(before, after)) == matters


@pytest.mark.parametrize(
    ("name", "block", "projection"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3", "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc", "transformer.h.11", "mlp.c_fc"),
        ("layers.1.experts.0.w1", "layers.1", "experts.0.w1"),
        ("0.linear", "0", "linear"),
        ("layers.2", "", "layers.2"),
        ("lm_head", "", "lm_head"),
        ("conv1d.proj2.out", "", "conv1d.proj2.out"),
    ],
)
def test_block_and_projection_part_the_name_at_its_first_number(name, block, projection):
    site = Site(name, in_features=3, out_features=5)
    assert (site.block, site.projection) == (block, projection)
    assert site.parameters(r=4) == 4 * 3 + 4 * 5


# -- PEFT's own rules ------------------------------------------------------------------------------------------------

CONFIGS = {
    "suffix": {"target_modules": ["q_proj", "query", "c_attn", "q", "linear"]},
    "suffixes": {"target_modules": ["v_proj", "down_proj", "value", "dense", "c_proj", "wo", "linear"]},
    "regex": {"target_modules": r".*\.(0|1)\..*(q|k)(_proj|uery|ey)?|.*c_attn|lin.*"},
    "regex of one layer": {"target_modules": r".*[.](layers|layer|h|block)[.]0[.].*(proj|dense|c_fc|q)|linear"},
    "all": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "all but some": {"target_modules": "all-linear", "task_type": "SEQ_CLS", "exclude_modules": ["q_proj", "key", "k"]},
    "excluded by regex": {
        "target_modules": ["q_proj", "v_proj", "query", "value", "c_attn", "c_proj", "q", "v", "linear"],
        "exclude_modules": r".*\.0\..*(v_proj|value|c_proj|v)",
    },
    "one layer": {"target_modules": ["up_proj", "dense", "c_fc", "k", "linear"], "layers_to_transform": [1]},
    "first layer": {"target_modules": ["v_proj", "query", "c_fc", "k", "linear"], "layers_to_transform": 0},
    "layers by pattern": {
        "target_modules": ["up_proj", "dense", "c_fc"],
        "layers_to_transform": [0],
        "layers_pattern": ["layers", "layer", "h"],
    },
    "part trained whole": {
        "target_modules": ["o_proj", "up_proj", "query", "dense", "c_attn", "c_proj", "q", "linear"],
        "modules_to_save": ["mlp", "pooler", "output", "EncDecAttention"],
    },
    "head wanted": {"target_modules": ["q_proj", "lm_head", "classifier", "c_attn"]},
    "one full name": {
        "target_modules": ["model.layers.1.mlp.down_proj", "transformer.h.1.mlp.c_fc", "classifier", "linear", "q"]
    },
    "nothing": {"target_modules": ["no_such_layer"]},
}


def config_for(model, fields):
    """The config without the listed targets that the model lacks, which tests/model/test_requested.py is about."""
    wanted = fields["target_modules"]
    if not isinstance(wanted, list):
        return LoraConfig(**fields)
    here = [entry for entry in wanted if any(f".{name}".endswith(f".{entry}") for name, _ in model.named_modules())]
    return LoraConfig(**{**fields, "target_modules": here or wanted})


#: Other lists of names are for several families, too.
several_families = pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")


@pytest.mark.sampled(24)
@several_families
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("build", [llama, bert, gpt2, t5, Attending])
def test_the_sites_are_the_layers_that_peft_adapts(build, config):
    lora = config_for(build(), CONFIGS[config])
    try:
        expected = adapted(build(), deepcopy(lora))
    except ValueError:  # PEFT found nothing
        with pytest.raises(SiteError):
            find_sites(build(), lora)
    else:
        expected = [name for name in expected if name != "attention.out_proj"]  # see above: it would do nothing
        assert names(build(), lora) == expected


@several_families
def test_the_configs_of_that_test_tell_rules_apart():
    given = {config: config_for(llama(), fields) for config, fields in CONFIGS.items() if config != "nothing"}
    found = {config: names(llama(), lora) for config, lora in given.items()}
    assert len({tuple(sites) for sites in found.values()}) == len(found)


@pytest.mark.parametrize("excluded", [["q_proj"], r".*mlp.*"])
def test_exclude_modules_also_count_where_no_target_is_given(excluded):
    lora = LoraConfig(exclude_modules=excluded)
    assert names(llama(), lora) == adapted(llama(), LoraConfig(exclude_modules=excluded, target_modules="all-linear"))
    assert "in exclude_modules" in reasons(llama(), lora).values()


def test_an_excluded_layer_says_so_although_it_is_a_target():
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    assert reasons(llama(), lora)["model.layers.0.self_attn.v_proj"] == "in exclude_modules"


def test_layers_to_transform_also_count_where_no_target_is_given():
    assert {site.block for site in find_sites(llama(), LoraConfig(layers_to_transform=[1])).sites} == {"model.layers.1"}


def test_all_linear_is_read_in_any_case():
    assert names(llama(), LoraConfig(target_modules="All-Linear")) == names(llama())


def test_all_linear_takes_the_pooler_and_never_the_head():
    pooler = "bert.pooler.dense"
    assert set(names(bert(), LoraConfig(target_modules="all-linear"))) - set(names(bert())) == {pooler}
    assert names(bert(), LoraConfig(target_modules=["pooler.dense"])) == [pooler]


@pytest.mark.parametrize(
    ("task", "heads"),
    [("SEQ_CLS", ("classifier", "score")), ("QUESTION_ANS", ("qa_outputs",)), ("CAUSAL_LM", ()), (None, ())],
)
def test_the_heads_of_a_task_are_those_that_peft_saves_whole(task, heads):
    assert trained_modules(LoraConfig(task_type=task)) == heads
    assert trained_modules(LoraConfig(task_type=task, modules_to_save=["a", *heads])) == ("a", *heads)
    if task not in (None, "CAUSAL_LM"):  # PEFT adds them to the config when it wraps a model
        wrapped = get_peft_model(bert(), LoraConfig(task_type=task, target_modules=["query"]))
        assert set(wrapped.peft_config["default"].modules_to_save) == set(heads)


# -- through PEFT's wrappers -----------------------------------------------------------------------------------------


@several_families
@pytest.mark.parametrize(
    ("build", "lora"),
    [
        (llama, LoraConfig(target_modules=["q_proj"])),
        pytest.param(
            llama,
            LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        ),
        pytest.param(
            llama,
            LoraConfig(target_modules=["q_proj", "lm_head"]),
        ),
        (gpt2, LoraConfig(target_modules=["c_attn", "c_fc"])),
        (bert, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "pooler.dense"])),
        pytest.param(
            roberta,
            LoraConfig(task_type="SEQ_CLS", target_modules=["query"]),
        ),
    ],
)
def test_a_peft_model_shows_the_sites_of_its_base(build, lora):
    base, wrapped = build(), get_peft_model(build(), lora)
    assert isinstance(wrapped, PeftModel)
    one_of = config_for(base, {"target_modules": ["up_proj", "value", "c_fc"]})
    for wanted in (None, LoraConfig(task_type=lora.task_type), one_of):
        assert find_sites(wrapped, wanted) == find_sites(base, wanted)
    assert linear_sites(wrapped) == linear_sites(base)


def test_looking_changes_neither_model_nor_config():
    lora = LoraConfig(target_modules=["q_proj"], exclude_modules=["v_proj"], modules_to_save=["lm_head"])
    model, before = llama(), dict(lora.to_dict())
    tree = [(name, type(module)) for name, module in model.named_modules()]
    find_sites(model, lora)
    assert lora.to_dict() == before
    assert [(name, type(module)) for name, module in model.named_modules()] == tree


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "lora", "text"),
    [
        (nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()), None, "Sequential has no linear layer"),
        (nn.Embedding(3, 3), LoraConfig(target_modules=["q_proj"]), "Embedding has no linear layer"),
        (llama(), LoraConfig(target_modules=["q_prj"]), "q_proj"),
        (llama(), LoraConfig(target_modules=["query_proj"]), "q_proj"),
        (llama(), LoraConfig(target_modules=["attn.q_proj_"]), "q_proj"),
        (llama(), LoraConfig(target_modules=r".*\.zzz"), "there are: "),
        (llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), "q_proj"),
        (llama(), LoraConfig(target_modules=["lm_head"], modules_to_save=["lm_head"]), "lm_head"),
        (bert(), LoraConfig(exclude_modules=r".*encoder.*"), "no site is left"),
    ],
)
def test_nothing_to_adapt_is_one_line_that_says_what_there_is(model, lora, text):
    with pytest.raises(SiteError) as caught:
        find_sites(model, lora)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "lora", "reason"),
    [
        (Attending(), LoraConfig(target_modules=["out_proj"]), "nn.MultiheadAttention"),
        (llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]), "exclude_modules"),
        (llama(), LoraConfig(target_modules=["lm_head"], modules_to_save=["lm_head"]), "modules_to_save"),
    ],
)
def test_a_wanted_layer_that_was_left_out_is_named_with_the_reason(model, lora, reason):
    with pytest.raises(SiteError) as caught:
        find_sites(model, lora)
    assert reason in str(caught.value)
