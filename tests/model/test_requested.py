"""Whatever ``target_modules`` asks for is a candidate, or skipped with a reason and a warning, or an error."""

import random
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import weightlora
from weightlora.errors import PlanMismatchError, SiteError, WeightLoraWarning
from weightlora.model.sites import Candidates, find_sites
from weightlora.plan.plan import make_plan

KINDS = [
    *[lambda: nn.Linear(4, 4)] * 6,
    lambda: Conv1D(4, 4),
    lambda: nn.Embedding(4, 4),
    lambda: nn.Conv1d(4, 4, 1),
    lambda: nn.Conv2d(4, 4, 1),
    lambda: nn.LayerNorm(4),
    lambda: nn.MultiheadAttention(4, 1),
    lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
]
NAMES = ["query", "key", "value", "dense", "embed", "conv", "norm"]


def any_model(rng: random.Random) -> nn.Module:
    """One to three blocks with some of the names, each a module of any kind."""
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.blocks = nn.ModuleList(
        nn.ModuleDict({name: rng.choice(KINDS)() for name in rng.sample(NAMES, rng.randint(1, 5))})
        for _ in range(rng.randint(1, 3))
    )
    return model


def any_entry(rng: random.Random, model: nn.Module) -> str:
    """The name of a module, its ending, a name that it may lack, or a misspelling of one."""
    name = rng.choice([name for name, _ in model.named_modules() if name])
    entry = rng.choice([name, name.rsplit(".", 1)[-1], ".".join(name.split(".")[-2:]), rng.choice(NAMES)])
    if rng.random() < 0.2:
        place = rng.randrange(len(entry))
        entry = entry[:place] + rng.choice("xyz") + entry[place + 1 :]
    return entry


def peft_adapts(model: nn.Module, lora: LoraConfig) -> set[str]:
    """What PEFT puts adapters on."""
    base = get_peft_model(model, lora).get_base_model()
    inside = {f"{name}.base_layer" for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    adapted = {name for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name for name in adapted if not name.startswith(tuple(inside))}


def looked_for(model: nn.Module, entries: list[str]) -> tuple[Candidates | None, list[warnings.WarningMessage], str]:
    """The candidates or None, the warnings, and the text of the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightLoraWarning)
        try:
            return find_sites(model, LoraConfig(r=2, target_modules=entries)), caught, ""
        except SiteError as error:
            return None, caught, str(error)


@pytest.mark.slow
def test_no_requested_name_vanishes_without_a_word():
    counts = dict.fromkeys(["silent", "warned", "refused", "misspelt", "compared with PEFT"], 0)
    for seed in range(800):
        rng = random.Random(seed)
        model = any_model(rng)
        entries = sorted({any_entry(rng, model) for _ in range(rng.randint(1, 4))})
        matched = {e: {n for n, _ in model.named_modules() if n == e or n.endswith(f".{e}")} for e in entries}
        found, caught, error = looked_for(model, entries)
        if found is None:
            counts["refused"] += 1
            assert "\n" not in error
            if "no module is named" in error:
                counts["misspelt"] += 1
                assert all(repr(e) in error for e in sorted(e for e in entries if not matched[e])[:3])
                continue
            wanted = [name for names in matched.values() for name in names if not name.endswith("out_proj")]
            assert not any(isinstance(model.get_submodule(name), (nn.Linear, Conv1D)) for name in wanted)
            continue
        sites, skipped = {site.name for site in found.sites}, {skip.name for skip in found.skipped}
        assert all(matched.values())
        asked = {name for names in matched.values() for name in names}
        assert asked <= sites | skipped
        assert bool(asked - sites) == bool(caught), (entries, asked - sites)
        counts["warned" if caught else "silent"] += 1
        try:
            adapted = peft_adapts(model, LoraConfig(r=2, target_modules=entries))
        except ValueError:  # it names a module that PEFT cannot adapt
            assert caught
            continue
        counts["compared with PEFT"] += 1
        assert adapted & sites == sites
        assert adapted - {name for name in adapted if name.endswith("out_proj")} <= sites | skipped
    assert all(n >= 40 for n in counts.values()), counts


# -- the texts ---------------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "v_prj"], r"'v_prj' \(closest: 'v_proj'\)"),
        (["q_proj", "self_attn.v_prj"], r"'self_attn.v_prj' \(closest: 'self_attn.v_proj'\)"),
        (["q_proj", "query"], "'query'"),  # of another architecture
        (["q_proj", "v_prj", "k_prj"], r"'k_prj' \(closest: 'k_proj'\), 'v_prj' \(closest: 'v_proj'\)"),
    ],
)
def test_a_misspelt_target_among_others_is_an_error_that_names_the_closest(targets, named):
    model = llama()
    with pytest.raises(SiteError, match=f"no module is named {named}; correct") as caught:
        find_sites(model, LoraConfig(target_modules=targets))
    assert "\n" not in str(caught.value)
    with pytest.raises(SiteError, match=named):
        weightlora.select(model, [{}], lora=LoraConfig(target_modules=targets), loss_fn=lambda *_: 1 / 0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens: Embedding is no linear layer"),
        ({"target_modules": ["q_proj", "mlp"]}, "model.layers.0.mlp: LlamaMLP is no linear layer"),
        ({"target_modules": r".*(q_proj|norm)"}, "LlamaRMSNorm is no linear layer; and 2 more"),  # 2·2 + 1 norms
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_prj"]}, "exclude_modules .*closest: 'k_proj'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern .*'v_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_poj": 2}}, "alpha_pattern .*closest: 'q_proj'"),
    ],
)
def test_what_has_no_effect_is_named_in_one_line(fields, text):
    with pytest.warns(WeightLoraWarning, match=text) as caught:
        find_sites(llama(), LoraConfig(**fields))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj", "model.layers.1.mlp.up_proj"],
            "rank_pattern": {r"layers\.1\..*up_proj": 2, "q_proj": 3},
        },
        {"target_modules": r".*\.[qv]_proj", "exclude_modules": r".*\.7\..*", "alpha_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},  # asked for in another way
    ],
)
def test_what_has_its_effect_is_not_warned_about(fields):
    find_sites(llama(), LoraConfig(**fields))  # warnings are errors


def test_only_names_of_other_kinds_are_an_error_that_says_which():
    with pytest.raises(SiteError, match=r"model.embed_tokens \(Embedding is no linear layer\)"):
        find_sites(llama(), LoraConfig(target_modules=["embed_tokens"]))


# -- exactly the planned sites -----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(4, 4), nn.Embedding(4, 4)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 1)


@pytest.mark.parametrize("extra", ["embedding", "conv1", "conv2", "conv3", "attention"])
def test_check_sees_an_extra_adapter_on_a_layer_of_any_kind(extra):
    lora = LoraConfig(r=2, target_modules=["linear"])
    plan = make_plan(find_sites(Mixed(), lora).sites, lora, ["linear"])
    plan.check(get_peft_model(Mixed(), lora))
    with pytest.raises(PlanMismatchError, match=f"{extra}: rank 2, not planned"):
        plan.check(get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["linear", extra])))
