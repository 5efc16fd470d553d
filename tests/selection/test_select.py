"""`select` from the outside: what it finds, what it takes, what it carries through and what it refuses."""

import json
import os
import random
import subprocess
import sys
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from selecting import fingerprint, ruled
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
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
    T5Config,
    T5ForConditionalGeneration,
)

from weightlora import WeightLoraError, select
from weightlora.errors import OptionError, SelectionError, SiteError, WeightLoraWarning
from weightlora.model.layers import lora_layers
from weightlora.model.sites import Site
from weightlora.selection.select import select_trained

RULES = ["first_order", "paper"]


def quietly(model, batches, **options):
    return select(model, batches, **ruled(**{"steps": 3, "adapters": 1, "progress": False, **options}))


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).mean()


def pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(8, 6, generator=generator), "y": torch.rand(8, 6, generator=generator)} for _ in range(count)
    ]


# What it finds


class Branches(nn.Module):
    """Six layers, each of which sees six features of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, 1) for _ in range(6))

    def forward(self, x):
        return sum(branch(x[:, i]) for i, branch in enumerate(self.branches))


def found(rule, seed, planted):
    """The two branches kept where the target is the sum of the features of ``planted``; of none, it is noise."""
    torch.manual_seed(seed)

    def batch():
        x = torch.randn(64, 6, 6)
        return {"x": x, "y": x[:, planted].sum((1, 2)).unsqueeze(1) if planted else 12**0.5 * torch.randn(64, 1)}

    data = [batch() for _ in range(10)]
    plan = quietly(Branches(), data, adapters=2, steps=10, rule=rule, threshold_every=10, loss_fn=squared, seed=seed)
    return {int(name.rsplit(".", 1)[1]) for name in plan.names}


@pytest.mark.parametrize("rule", RULES)
def test_layers_that_can_lower_the_loss_are_found_and_noise_prefers_none(rule):
    assert all(found(rule, seed, planted=[1, 4]) == {1, 4} for seed in range(8))
    # Negative control: by chance alone a pair is found once in 15; three times or more in 8 has a chance of 1.3 %.
    assert sum(found(rule, seed, planted=[]) == {1, 4} for seed in range(8)) < 3


def test_the_better_half_of_minilm_is_kept(minilm, review_batches):
    plan = quietly(minilm, review_batches, lora=LoraConfig(r=4, task_type="SEQ_CLS"), adapters=18, head_steps=3)
    assert len(plan.entries) == 36
    by_score = sorted(plan.scores, key=plan.scores.get, reverse=True)
    best_three = [[name for name in by_score if f"layer.{block}." in name][:3] for block in range(6)]
    assert plan.names == tuple(sorted(name for names in best_three for name in names))
    assert {entry.r for entry in plan.entries} == {0, 4}
    model = plan.attach(minilm)
    assert tuple(lora_layers(model)) == plan.names


# What decides it


@pytest.mark.parametrize("rule", RULES)
def test_seed_alone_decides(rule):
    def plan(outer, seed):
        for module in (random, np.random):
            module.seed(outer)
        torch.manual_seed(outer)
        shuffled = torch.utils.data.DataLoader(pairs(32)[0]["x"], batch_size=4, shuffle=True)
        lora = LoraConfig(r=2, lora_dropout=0.2)  # A, two kinds of dropout and the loader's order are all random
        model = net(dropout=0.1)
        torch.manual_seed(outer)
        return quietly(
            model, shuffled, lora=lora, steps=2, rule=rule, seed=seed, loss_fn=lambda m, x: m(x).exp().mean()
        )

    assert plan(outer=1, seed=0) == plan(outer=2, seed=0)
    assert plan(outer=1, seed=0).history != plan(outer=1, seed=1).history


SCRIPT = """
import sys
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification
import weightlora
from weightlora import select
from weightlora.selection.rules.paper import StoIHT

sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
batch = {"input_ids": torch.arange(32).reshape(4, 8), "labels": torch.tensor([0, 1, 1, 0])}
lora = LoraConfig(r=2, target_modules=["query", "key", "value", "dense"], modules_to_save=["classifier", "pooler"])
plan = select(model, [batch] * 5, lora=lora, steps=3, rule=StoIHT(head_steps=2), progress=False)
plan.save(sys.argv[1])
"""


@pytest.mark.slow
def test_plan_does_not_depend_on_the_hash_seed(tmp_path):
    """PEFT keeps names in sets, whose order the hash seed decides; here two processes, at once to save time."""
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, file], env={**os.environ, "PYTHONHASHSEED": file.stem})
        for file in files
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(json.loads(files[0].read_text())["history"]) == 3


# What it carries through

PLANNED = {"target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}


def content(lora):
    """A config's fields but for those that are the plan; PEFT makes sets of lists, which a plan writes as lists."""
    fields = {key: value for key, value in vars(lora).items() if key not in PLANNED}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"modules_to_save": ["5"], "bias": "lora_only"},
        {"task_type": "FEATURE_EXTRACTION", "exclude_modules": ["3"], "lora_bias": True},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_users_config_is_carried_through_and_left_alone(fields):
    lora = LoraConfig(r=2, lora_alpha=3, **fields)
    given, model = deepcopy(vars(lora)), net()
    before = fingerprint(model)  # PiSSA writes to the base weights where it is attached
    config = quietly(model, pairs(8), lora=lora, head_steps=0, loss_fn=squared).to_lora_config()
    assert vars(lora) == given
    assert fingerprint(model) == before
    assert content(config) == content(lora)
    assert (config.r, config.lora_alpha) == (2, 3)
    assert vars(config) != vars(LoraConfig(r=2, lora_alpha=3, target_modules=config.target_modules))


def test_modules_that_peft_adds_for_the_task_are_not_written_into_the_users_config():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["pooler"])
    batch = {"input_ids": torch.randint(4, 40, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
    plan = quietly(BertForSequenceClassification(BertConfig(**SMALL)), [batch] * 4, lora=lora, head_steps=1)
    assert lora.modules_to_save == ["pooler"] == plan.to_lora_config().modules_to_save


def test_scoring_runs_with_the_users_scale_and_dropout():
    def scores(**fields):
        plan = quietly(net(), pairs(3), lora=LoraConfig(r=4, lora_alpha=8, **fields), loss_fn=squared)
        return torch.tensor(list(plan.scores.values()))

    # ∂L/∂B is proportional to the scale, with B = 0 exactly: α/√r instead of α/r, and 3·α.
    torch.testing.assert_close(scores(use_rslora=True), 2 * scores())
    torch.testing.assert_close(scores(alpha_pattern={"0": 24}), scores() * torch.tensor([3.0, 1.0, 1.0]))
    assert not torch.allclose(scores(lora_dropout=0.5), scores(), rtol=0.01)


def test_users_rank_pattern_decides_the_ranks():
    lora = LoraConfig(r=2, lora_alpha=4, rank_pattern={"3": 5}, alpha_pattern={"3": 7})
    plan = quietly(net(), pairs(3), lora=lora, adapters=3, loss_fn=squared)
    assert plan.ranks == {"0": 2, "3": 5, "5": 2}
    layers = lora_layers(plan.attach(net()))
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == {"0": 2.0, "3": 7 / 5, "5": 2.0}


def test_parameter_budget_holds_under_a_rank_pattern():
    lora = LoraConfig(r=1, rank_pattern={"3": 20})
    assert quietly(net(), pairs(3), lora=lora, parameters=40, loss_fn=squared).parameters <= 40


class Nested(nn.Module):
    """The name of one layer, ``proj``, is the ending of another's, ``inner.proj``."""

    def __init__(self):
        super().__init__()
        self.proj, self.inner = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x):
        return self.inner["proj"](self.proj(x).tanh())


def test_site_whose_name_ends_an_excluded_ones():
    lora = LoraConfig(r=2, exclude_modules=["inner.proj"])
    assert quietly(Nested(), pairs(3), lora=lora, loss_fn=squared).names == ("proj",)


# What it takes


def test_peft_model_gives_its_own_config_and_sites():
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "3"], lora_dropout=0.1, init_lora_weights=False)
    model = get_peft_model(net(), lora)
    plan = quietly(model, pairs(3), loss_fn=squared)
    assert list(plan.scores) == ["0", "3"]
    config = plan.to_lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == (3, 5, 0.1, False)
    # The adapters that it carries are put aside: the base model is asked, from B = 0.
    assert plan == quietly(net(), pairs(3), lora=lora, loss_fn=squared)


def test_peft_model_can_be_asked_for_another_config():
    model = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    assert list(quietly(model, pairs(3), lora=LoraConfig(r=2), loss_fn=squared).scores) == ["0", "3", "5"]


def test_loader_list_and_generator_of_the_same_batches_give_the_same_plan():
    data = pairs(3)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    plans = [quietly(net(), batches, loss_fn=squared) for batches in (data, loader, iter(data), (b for b in data))]
    assert all(plan == plans[0] for plan in plans)


def test_fewer_batches_than_steps_are_used_again_with_a_warning():
    data = pairs(2)
    with pytest.warns(WeightLoraWarning, match="2 batches for 5 scoring steps"):
        plan = quietly(net(), data, steps=5, loss_fn=squared)
    assert plan == quietly(net(), [*data, *data, data[0]], steps=5, loss_fn=squared)


def test_options_are_recorded():
    plan = quietly(
        net(), pairs(4), steps=4, adapters=2, rule="paper", learning_rate=0.01, gate_lr=2.0, seed=7, loss_fn=squared
    )
    expected = {"adapters": 2, "steps": 4, "head_steps": 0, "threshold_every": 1, "order": "alternating"}
    assert plan.options == {**expected, "learning_rate": 0.01, "gate_lr": 2.0, "agreement": pytest.approx(1)}
    assert (plan.rule, plan.seed, len(plan.history)) == ("paper", 7, 4)


@pytest.mark.slow
def test_first_order_spreads_its_sites_unless_asked_or_not_counted(minilm, review_batches):
    def chosen(**options):
        lora = LoraConfig(r=2, task_type="SEQ_CLS")
        return quietly(minilm, review_batches, **{"lora": lora, "adapters": 3, "head_steps": 2, **options})

    def parts(plan):
        return {int(name.split(".")[3]) // 2 for name in plan.names}  # of six blocks

    plan, by_score = chosen(), chosen(ranking="score")
    assert plan.options["ranking"] == "spread"
    assert plan.scores == by_score.scores
    assert parts(plan) == {0, 1, 2}
    assert by_score.names == tuple(sorted(sorted(plan.scores, key=plan.scores.get, reverse=True)[:3]))
    assert len(parts(by_score)) < 3  # negative control
    assert "ranking" not in by_score.options
    assert chosen(adapters=None, parameters=0.3, rule="first_order").options["ranking"] == "spread"
    for other in ({"time": 0.8}, {"rule": "kappa_tune"}):
        assert "ranking" not in chosen(**other).options
    assert chosen(rule="kappa_tune").names == chosen(rule="kappa_tune", ranking="score").names


def test_defaults_are_twenty_steps_and_twenty_more_for_a_fresh_head():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return squared(model, batch)

    for lora, steps in ((LoraConfig(), 20), (LoraConfig(modules_to_save=["5"]), 40)):
        calls.clear()
        plan = select(net(), pairs(1) * 40, lora=lora, loss_fn=loss, progress=False)
        assert (len(calls), len(plan.history)) == (steps, 20)


# Every architecture

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLM = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
BART_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "max_position_embeddings": 32,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART_SIDE.items()},
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}

ARCHITECTURES = {
    # name: model, task type, number of linear layers that are neither head nor pooler
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), "SEQ_CLS", 2 * 6),
    "deberta": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, **DEBERTA)), "SEQ_CLS", 2 * 6),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "SEQ_2_SEQ_LM", 6 + 10),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "SEQ_2_SEQ_LM", 6 + 10),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "CAUSAL_LM", 2 * 4),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLM)), "CAUSAL_LM", 2 * 7),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**LLM)), "CAUSAL_LM", 2 * 7),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rule", RULES)
def test_architecture(name, rule):
    make, task, count = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, tokens = make(), torch.randint(4, 40, (4, 8))
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 1, 1, 0]) if task == "SEQ_CLS" else tokens}
    before = fingerprint(model)
    lora = LoraConfig(r=2, task_type=task, fan_in_fan_out=name == "gpt2")
    head_steps = 2 if task == "SEQ_CLS" else 0
    plan = quietly(model, [batch] * 5, lora=lora, adapters=count // 2, head_steps=head_steps, rule=rule)
    assert fingerprint(model) == before
    assert (len(plan.entries), len(plan.names)) == (count, count // 2)
    assert tuple(lora_layers(plan.attach(model))) == plan.names


@pytest.mark.parametrize("rule", RULES)
def test_quantised_layers(quantised_net, rule):
    data = [{"x": torch.randn(5, 64), "y": torch.rand(5, 64)} for _ in range(3)]
    before = fingerprint(quantised_net)
    plan = quietly(quantised_net, data, lora=LoraConfig(r=2), rule=rule, loss_fn=squared)
    assert fingerprint(quantised_net) == before
    assert {site.site for site in plan.entries} == {Site("0", 64, 64), Site("2", 64, 64)}
    assert tuple(lora_layers(plan.attach(quantised_net))) == plan.names


def test_default_head_steps_where_peft_knows_no_head_of_the_model():
    from transformers import BartForSequenceClassification

    torch.manual_seed(0)
    tokens = torch.cat([torch.randint(4, 40, (4, 7)), torch.full((4, 1), 2)], dim=1)
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 1, 1, 0])}
    plan = quietly(BartForSequenceClassification(BartConfig(**BART)), [batch] * 3, lora=LoraConfig(task_type="SEQ_CLS"))
    assert len(plan.names) == 1


# What it refuses


class Unread(nn.Module):
    """A layer that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.unread, self.free = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return 0 * self.unread(x) + x * self.free


def at_step(step, value):
    """A loss that becomes ``value`` at ``step``."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        return squared(model, batch) * (value if len(calls) == step else 1.0)

    return loss


class NotFinite(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * float("nan")


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "one step": (OptionError, "steps=1", lambda: {"steps": 1}),
    "negative head_steps": (OptionError, "head_steps=-2", lambda: {"head_steps": -2}),
    "unknown rule": (OptionError, "rule='stoith'", lambda: {"rule": "stoith"}),
    "rate is nan": (OptionError, "learning_rate=nan", lambda: {"learning_rate": NAN}),
    "no threshold": (OptionError, "threshold_every=0", lambda: {"rule": "paper", "threshold_every": 0}),
    "keep more than there is": (OptionError, "adapters=4 exceeds the 3", lambda: {"adapters": 4}),
    "head_steps without a head": (OptionError, "head_steps=2, .*modules_to_save", lambda: {"head_steps": 2}),
    "detached loss": (SelectionError, "step 1.*no gradient", lambda: {"loss_fn": lambda m, b: squared(m, b).detach()}),
    "loss is a float": (
        SelectionError,
        "step 1.*a float.*loss_fn",
        lambda: {"loss_fn": lambda m, b: squared(m, b).item()},
    ),
    "loss is a vector": (SelectionError, r"\(8, 6\).*loss_fn", lambda: {"loss_fn": lambda m, b: m(b["x"])}),
    "loss is nan": (
        SelectionError,
        "scoring step 3: the loss is nan.*learning_rate",
        lambda: {"loss_fn": at_step(3, NAN), "order": "joint"},
    ),
    "loss is inf": (
        SelectionError,
        "scoring step 3: the loss is inf.*learning_rate",
        lambda: {"loss_fn": at_step(3, float("inf")), "order": "joint"},
    ),
    "gradient is nan": (
        SelectionError,
        "scoring step 1: a gradient is not finite.*learning_rate",
        lambda: {"loss_fn": lambda m, b: NotFinite.apply(squared(m, b))},
    ),
    "batches of tuples": (
        SelectionError,
        "a tuple.*loss_fn",
        lambda: {"loss_fn": None, "batches": [(torch.ones(2, 6),)]},
    ),
    "no loss": (SelectionError, "labels.*loss_fn", lambda: {"loss_fn": None, "batches": [{"input": torch.ones(2, 6)}]}),
    "no batch": (SelectionError, "batches is empty", lambda: {"batches": []}),
    "empty generator": (SelectionError, "batches is empty", lambda: {"batches": iter(())}),
    "nothing depends on the sites": (
        SelectionError,
        "no site had a gradient in 3 scoring steps",
        lambda: {"model": Unread(), "loss_fn": squared},
    ),
    "ia3": (
        OptionError,
        "IA3.*lora=",
        lambda: {"model": get_peft_model(net(), IA3Config(target_modules=["0"], feedforward_modules=[])), "lora": None},
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_the_model_is_as_it_was(case, rule):
    kind, text, changes = REFUSED[case]
    arguments = {"model": net(), "batches": pairs(5), "loss_fn": squared, "rule": rule, "lora": LoraConfig(r=2)}
    arguments = {**arguments, **changes()}
    before = fingerprint(arguments["model"])
    with pytest.raises(kind, match=text) as error:
        quietly(**arguments)
    assert isinstance(error.value, WeightLoraError)
    assert "\n" not in str(error.value)
    assert fingerprint(arguments["model"]) == before


#: Each argument of ``select`` with values that it cannot have.
WRONG = {
    "model": [None, 5, "bert", {}, nn.Linear, nn.DataParallel(net()), nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 6))],
    "batches": [None, 5, "text", pairs(1)[0]],
    "lora": [{}, {"r": 8}, "lora", 8, True, LoraConfig],
    "adapters": [0, -1, 1.5, "", "18", [], {}, True, NAN, INF],
    "parameters": [0, -1, 1.5, "", "300k", [], {}, True, NAN, INF],
    "time": [0, -0.5, 1.5, 2, "0.8x", [], {}, True, NAN, INF],
    "memory": [0, 8, 8e9, "8", "", "0MB", "-3MB", "much", [], {}, True, NAN],
    "rule": [5, "first", [], {}, object()],
    "steps": ["4", "soon", 2.5, True, [3], -1, 0, NAN],
    "total_steps": ["100", 2.5, True, [], -1],
    "learning_rate": ["1e-3", None, True, 1j, [1], -1, 0, NAN, INF],
    "head_learning_rate": ["1e-3", True, [], -1, 0, NAN],
    "seed": [None, "0", 1.5, True, [0], -1, 2**32],
    "ranking": ["best", 5, [], {}, True],
    "loss_fn": [5, "loss", []],
    "fast": ["yes", True, 5, [], {}],
    "progress": ["yes", None, 5],
}


@pytest.mark.parametrize("choose", [select, partial(select_trained, rule="integrated")])
@pytest.mark.parametrize("name", WRONG)
def test_no_argument_of_a_wrong_type_gets_as_far_as_the_model(name, choose):
    given = {
        "batches": pairs(3),
        "lora": LoraConfig(r=2),
        "adapters": 1,
        "steps": 3,
        "loss_fn": squared,
        "progress": False,
    }
    for value in WRONG[name]:
        model = value if name == "model" else net()
        before = fingerprint(model) if isinstance(model, nn.Module) and not _is_lazy(model) else None
        with pytest.raises(WeightLoraError) as error:
            choose(**{"model": model, **given, name: value})
        assert isinstance(error.value, TypeError | ValueError), value
        assert "\n" not in str(error.value), value
        assert name in str(error.value) or name == "model", (value, str(error.value))
        assert before is None or fingerprint(model) == before, value


def test_a_data_parallel_model_and_a_lazy_one_are_told_what_to_do():
    with pytest.raises(SiteError, match=r"inside DataParallel, .*give model.module"):
        quietly(nn.DataParallel(net()), pairs(3), loss_fn=squared)
    with pytest.raises(
        SiteError, match=r"^0.weight \(2 of 4 weights\) has no shape yet, .*run the model on a batch once"
    ):
        quietly(nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 6)), pairs(3), loss_fn=squared)


def _is_lazy(model):
    return any(is_lazy(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("where", [1, 3, 4])
def test_error_names_phase_and_step(where):
    """Two steps of the head, then the scores: the third call is their first."""
    phase = {1: "head step 1", 3: "scoring step 1", 4: "scoring step 2"}[where]
    lora = LoraConfig(r=2, modules_to_save=["5"])
    with pytest.raises(SelectionError, match=f"^{phase}: the loss is nan"):
        quietly(net(), pairs(5), lora=lora, head_steps=2, loss_fn=at_step(where, NAN))


class HalfUnread(Unread):
    """One layer matters and one does not."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(6, 6)

    def forward(self, x):
        return super().forward(self.read(x))


@pytest.mark.parametrize("rule", RULES)
def test_a_site_that_the_loss_does_not_depend_on_is_named(rule):
    """Its ω stays at 1 under the paper's rule, which a threshold may well keep."""
    with pytest.warns(WeightLoraWarning, match=r"1 of 2 sites had no gradient.*unread"):
        quietly(HalfUnread(), pairs(3), adapters=1, rule=rule, threshold_every=3, loss_fn=squared)
    quietly(
        net(), pairs(3), adapters=1, rule=rule, threshold_every=3, loss_fn=squared
    )  # control: warnings of ours are errors here


@pytest.mark.filterwarnings("ignore:1 of 2 sites had no gradient")
def test_fewer_survivors_than_wanted_are_kept_alone_with_a_warning():
    with pytest.warns(WeightLoraWarning, match=r"only 1 of the 2 wanted sites have a positive score") as warned:
        plan = quietly(HalfUnread(), pairs(3), adapters=2, loss_fn=squared)
    assert plan.names == ("read",)
    assert {warning.filename for warning in warned} == {__file__}
    assert quietly(HalfUnread(), pairs(3), adapters=1, loss_fn=squared).names == ("read",)  # as many as wanted: none


@pytest.mark.filterwarnings("ignore:1 of 2 sites had no gradient")
def test_gates_that_turn_negative_are_no_survivors():
    """Step 1 moves B against its gradient; where step 2 asks for the opposite, ω falls by η·lr·s·‖∂L/∂B‖₁: below 0."""

    def opposite(model, batch):
        return batch["sign"] * squared(model, batch)

    def plan(second, model=None):
        data = [{**batch, "sign": sign} for batch, sign in zip(pairs(1) * 2, (1.0, second), strict=True)]
        options = {"rule": "paper", "order": "joint", "gate_lr": 1e4, "steps": 2, "loss_fn": opposite}
        return quietly(model or net(), data, adapters=2, **options)

    with pytest.raises(SelectionError, match=r"^none of the 2 wanted sites has a positive.*gate_lr or steps"):
        plan(second=-1.0)
    with pytest.warns(WeightLoraWarning, match="only 1 of the 2 wanted sites have a positive score"):
        assert plan(second=-1.0, model=HalfUnread()).names == ("unread",)  # whose gate stays at 1
    assert min(plan(second=1.0).scores[name] for name in plan(second=1.0).names) > 1
