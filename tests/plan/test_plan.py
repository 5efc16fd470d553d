import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from math import sqrt
from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from weightlora.cli import main
from weightlora.errors import OptionError, OutputError, PlanError, PlanMismatchError
from weightlora.model.layers import lora_layers
from weightlora.model.sites import Site, find_sites
from weightlora.plan.plan import AdapterPlan, PlannedSite, make_plan

Q0, V0, V1 = (f"model.layers.{name}_proj" for name in ("0.self_attn.q", "0.self_attn.v", "1.self_attn.v"))
UP1 = "model.layers.1.mlp.up_proj"


def llama(layers: int = 2, hidden: int = 16) -> LlamaForCausalLM:
    """A decoder whose sites have four different shapes."""
    shape = {"hidden_size": hidden, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=layers, **shape))


class Lookalikes(nn.Module):
    """Layers whose names a careless pattern mixes up: a suffix, a longer number, a dot that is a letter."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(4, 4)
        self.tail = nn.ModuleDict({"lin0": nn.Linear(4, 4)})
        self.tailxlin0 = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))

    def forward(self, x):
        return x


def plan_of(model: nn.Module, kept: Sequence[str] | None = None, **lora) -> AdapterPlan:
    """The plan that keeps some sites, or all, with scores that differ."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **lora})
    sites = find_sites(model, config).sites
    kept = [site.name for site in sites] if kept is None else kept
    return make_plan(sites, config, kept, [1 / (i + 1) for i in range(len(sites))])


def flat_plan(n: int, kept: Sequence[int], *, r: int = 8, alpha: float = 16, **fields) -> AdapterPlan:
    """``n`` sites of one shape."""
    sites = [Site(f"layers.{i:03}.x", 6, 6) for i in range(n)]
    return AdapterPlan(
        tuple(
            PlannedSite(site, lora_r=r, lora_alpha=alpha, r=r if i in kept else 0, alpha=alpha, score=0.5)
            for i, site in enumerate(sites)
        ),
        **fields,
    )


def adapters(model: nn.Module) -> dict[str, int]:
    """Rank of every LoRA layer that a model really has."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: m.r["default"] for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16).reshape(2, 8)).logits


# -- a frozen record -------------------------------------------------------------------------------------------------


def test_a_plan_is_frozen():
    plan = flat_plan(2, [0])
    with pytest.raises(FrozenInstanceError):
        plan.seed = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.entries[0].r = 3  # type: ignore[misc]


def test_names_ranks_scores_and_parameters_are_those_of_the_entries():
    plan = plan_of(llama(), [V0, UP1])
    assert plan.names == (V0, UP1)
    assert {name: r for name, r in plan.ranks.items() if r} == {V0: 4, UP1: 4}
    assert len(plan.ranks) == len(plan.scores) == 14
    assert plan.parameters == 4 * (16 + 8) + 4 * (16 + 24)
    # a layer has q, o: 16+16; k, v: 16+8; gate, up, down: 16+24
    assert plan.lora_parameters == 2 * 4 * (2 * 32 + 2 * 24 + 3 * 40)
    assert plan.parameters == sum(p.numel() for p in plan.attach(llama()).parameters() if p.requires_grad)


def test_the_users_rank_and_alpha_patterns_count_as_peft_reads_them():
    lora = {"rank_pattern": {"v_proj": 2, r"layers\.1\..*up_proj": 16}, "alpha_pattern": {"0.self_attn.v_proj": 5}}
    plan = plan_of(llama(), **lora)
    layers = lora_layers(get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **lora)))
    assert plan.ranks == {name: layer.r["default"] for name, layer in layers.items()}
    assert {e.site.name: e.alpha for e in plan.entries} == {n: m.lora_alpha["default"] for n, m in layers.items()}
    assert {2, 4, 16} == set(plan.ranks.values())


def test_similarity_has_its_closed_form():
    one, two = flat_plan(6, [0, 1, 2]), flat_plan(6, [1, 2, 3, 4])
    assert one.jaccard(two) == two.jaccard(one) == 2 / 5
    assert one.jaccard(one) == 1
    assert one.jaccard(flat_plan(6, [5])) == 0
    assert flat_plan(2, []).jaccard(flat_plan(2, [])) == 1


# -- on disk ---------------------------------------------------------------------------------------------------------

FIELDS = {
    "defaults": {},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
    "task": {"task_type": "CAUSAL_LM"},
    "dora": {"use_dora": True, "lora_dropout": 0.1},
    "rslora": {"use_rslora": True},
    "excluded": {"exclude_modules": ["q_proj", "k_proj"]},
    "bias": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("fields", FIELDS)
def test_a_plan_reads_back_as_it_was_and_keeps_the_users_fields(tmp_path, fields):
    plan = plan_of(llama(), [V0, UP1], **FIELDS[fields])
    plan = replace(plan, rule="paper", options={"parameters": 1000, "learning_rate": 1e-3}, seed=7, base_model="a/b")
    plan = replace(plan, history=(tuple(float(i) for i in range(len(plan.entries))),) * 2)
    for written in (plan, plan.expand()):
        written.save(tmp_path / "plan.json")
        read = AdapterPlan.load(tmp_path / "plan.json")
        assert read == written
        assert read.fingerprint == written.fingerprint
        assert read.to_lora_config().to_dict() == written.to_lora_config().to_dict()
    mine, planned = LoraConfig(**FIELDS[fields]).to_dict(), plan.to_lora_config().to_dict()
    for field in set(FIELDS[fields]) - {"rank_pattern", "alpha_pattern"}:
        same = set if isinstance(mine[field], set) else lambda value: value  # PEFT makes sets of some lists
        assert same(planned[field]) == same(mine[field])


SAME_BYTES = """
import sys
from peft import LoraConfig
from weightlora.plan.plan import make_plan
from weightlora.model.sites import Site
names = ["layers." + str(i) + ".x" for i in range(9)]
for folder, excluded in {"few": ["only one"], "many": list("abcdefghij")}.items():
    lora = LoraConfig(target_modules=names, modules_to_save=["head", "norm"], exclude_modules=excluded)
    plan = make_plan([Site(name, 4, 4) for name in names], lora, names[2:6])
    plan.to_lora_config().save_pretrained(folder)
    plan.save(folder + "/plan.json")
"""


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> list[dict[str, bytes]]:
    """What the same script writes in two processes, which differ in their hash seed."""
    folders = {seed: tmp_path_factory.mktemp(f"hash{seed}") for seed in "12"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SAME_BYTES], cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed, folder in folders.items()
    ]
    assert [process.wait() for process in running] == [0, 0]
    return [
        {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*")}
        for folder in folders.values()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "few/plan.json",
        "few/adapter_config.json",
        "many/plan.json",
        pytest.param(
            "many/adapter_config.json",
        ),
    ],
)
def test_two_processes_write_the_same_bytes(of_two_processes, name):
    one, two = of_two_processes
    assert one[name] == two[name]


def edited(tmp_path: Path, edit) -> Path:
    """A saved plan after somebody's edit."""
    path = tmp_path / "plan.json"
    replace(flat_plan(3, [1]), history=((0.1, 0.2, 0.3),)).save(path)
    data = json.loads(path.read_text())
    edit(data, data["sites"])
    path.write_text(json.dumps(data))
    return path


def swap(rows):
    rows[0], rows[1] = rows[1], rows[0]


EDITS = {
    "unknown schema": lambda data, _: data.update(schema=99),
    "no schema": lambda data, _: data.pop("schema"),
    "no sites": lambda data, _: data.pop("sites"),
    "sites that are none": lambda data, _: data.update(sites=None),
    "empty sites": lambda data, _: data.update(sites=[], history=[]),
    "no rule": lambda data, _: data.pop("rule"),
    "site that is a word": lambda _, rows: rows.append("word"),
    "site twice": lambda _, rows: rows.append(rows[-1]),
    "foreign name": lambda _, rows: rows[0].update(name="layers.000.y"),
    "edited shape": lambda _, rows: rows[0].update(in_features=7),
    "site taken out": lambda _, rows: rows.pop(),
    "sites out of order": lambda _, rows: swap(rows),
    "edited fingerprint": lambda data, _: data.update(fingerprint="0"),
    "negative rank": lambda _, rows: rows[0].update(r=-1),
    "no rank under LoRA": lambda _, rows: rows[0].update(lora_r=0),
    "rank that is a word": lambda _, rows: rows[0].update(r="many"),
    "no score": lambda _, rows: rows[0].pop("score"),
    "nothing kept": lambda _, rows: rows[1].update(r=0),
    "short history row": lambda data, _: data.update(history=[[0.1, 0.2]]),
    "long history row": lambda data, _: data.update(history=[[0.1, 0.2, 0.3, 0.4]]),
    "history of words": lambda data, _: data.update(history=[["a", "b", "c"]]),
    "history that is none": lambda data, _: data.update(history=None),
    "alpha that is a word": lambda _, rows: rows[1].update(alpha="many"),
    "negative alpha": lambda _, rows: rows[1].update(alpha=-8),
    "broken rank": lambda _, rows: rows[1].update(r=2.7),
    "fields that are a list": lambda data, _: data.update(lora=[]),
    "planned field": lambda data, _: data.update(lora={"r": 1}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_one_line_that_names_it(tmp_path, edit):
    path = edited(tmp_path, EDITS[edit])
    with pytest.raises(PlanError) as caught:
        AdapterPlan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sites_that_stand_there_twice_are_named(tmp_path):
    plan = flat_plan(3, [1])
    replace(plan, entries=(*plan.entries, plan.entries[-1])).save(tmp_path / "plan.json")  # its fingerprint fits
    with pytest.raises(PlanError, match=r"twice: layers\.002\.x;"):
        AdapterPlan.load(tmp_path / "plan.json")


def test_an_unedited_file_passes(tmp_path):
    assert AdapterPlan.load(edited(tmp_path, lambda *_: None)).names == ("layers.001.x",)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no JSON", b'{"schema": 1', b"[]", b"[1, 2]", b"3", b"null", b'"plan"', b"\xff\xfe", b"{}"],
)
def test_what_is_no_plan_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        AdapterPlan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [30, 500, 900, 2000, 100_000])
@pytest.mark.parametrize("field", ["options", "lora", "versions", "sites", "history", "target_parameters", "new"])
def test_a_plan_that_is_nested_deeply_is_one_line_for_all_that_read_it(tmp_path, capsys, field, depth):
    path = tmp_path / "plan.json"
    flat_plan(3, [1]).save(path)
    data = json.loads(path.read_text())
    held = data.get(field, [])
    data[field] = {**held, "x": "here"} if isinstance(held, dict) else [*held, "here"]
    path.write_text(json.dumps(data).replace('"here"', "[" * depth + "1" + "]" * depth))
    with pytest.raises(PlanError):
        AdapterPlan.load(path)
    for words in (["show"], ["emit", "--for=axolotl"]):
        assert main([*words, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line


def test_a_plan_cut_off_anywhere_is_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    flat_plan(3, [1]).save(path)
    whole = path.read_bytes().rstrip()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(PlanError):
            AdapterPlan.load(path)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        flat_plan(3, [1]).save(tmp_path / "file" / "plan.json")


# -- WeightLoRA+ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "r", "alpha", "new_r", "new_alpha"),
    [
        (8, 4, 8, 16, 16, 32),  # K = n/2: twice the rank
        (8, 8, 8, 16, 8, 16),  # all: nothing is free
        (8, 1, 8, 16, 64, 128),
        (8, 3, 8, 16, 21, 42),  # 8·8/3 = 21.3
        (8, 4, 8, 12, 16, 24),  # alpha/r = 3/2
        (8, 3, 8, 12, 20, 30),  # 21 would make alpha 31.5: the next lower rank with a whole alpha
        (7, 5, 4, 1, 4, 1),  # 5.6 → 4: alpha/r = 1/4 allows multiples of 4
        (8, 4, 8, 0.5, 16, 1),  # alpha was no whole number, so no rank need make it one
        (8, 3, 8, 0.5, 21, 1.3125),
    ],
)
def test_expand_spends_the_freed_budget_at_the_same_strength(n, k, r, alpha, new_r, new_alpha):
    plus = flat_plan(n, range(k), r=r, alpha=alpha).expand()
    assert set(plus.ranks.values()) - {0} == {new_r}
    assert plus.names == flat_plan(n, range(k)).names
    config = plus.to_lora_config()
    assert (config.r, config.lora_alpha) == (new_r, new_alpha)
    assert isinstance(config.lora_alpha, int) == float(new_alpha).is_integer()
    assert Fraction(config.lora_alpha) / config.r == Fraction(alpha) / r


def test_rslora_keeps_alpha_and_needs_no_multiple():
    plan = flat_plan(8, range(3), r=8, alpha=12, lora={"use_rslora": True})
    assert (plan.expand().to_lora_config().r, plan.expand().to_lora_config().lora_alpha) == (21, 12)


def test_another_budget_is_refused():
    with pytest.raises(OptionError, match="budget='bytes'"):
        flat_plan(2, [0]).expand("bytes")  # type: ignore[arg-type]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"v_proj": 2, "up_proj": 12}, "alpha_pattern": {"v_proj": 3}}]
)
@pytest.mark.parametrize("budget", ["ranks", "parameters"])
def test_expand_never_costs_more_than_plain_lora_in_what_it_counts(patterns, budget):
    plain = plan_of(llama(), **patterns)
    names = sorted(plain.ranks, key=lambda name: random.Random(name).random())
    widest = sorted(plain.ranks, key=lambda name: -plain.entries[[*plain.ranks].index(name)].site.parameters(1))
    for order in (names, widest, widest[::-1]):
        for k in range(1, len(order) + 1):
            plan = plan_of(llama(), order[:k], **patterns)
            plus = plan.expand(budget)
            assert plan.parameters <= plus.parameters
            assert plus.parameters <= plain.parameters or budget == "ranks"
            assert sum(plus.ranks.values()) <= sum(plain.ranks.values())
            assert plus.names == plan.names
            assert plus.expand(budget) == plus, "nothing is left to spend"
            for entry in plus.entries:
                if entry.r:
                    assert Fraction(entry.alpha) / entry.r == Fraction(entry.lora_alpha) / entry.lora_r
                    assert isinstance(entry.alpha, int)
                else:
                    assert entry.alpha == entry.lora_alpha


def test_the_papers_formula_costs_more_than_lora_where_wide_layers_are_kept_and_says_so():
    plan = plan_of(llama())
    widest = sorted(plan.entries, key=lambda entry: -entry.site.parameters(1))[:7]
    plus = plan_of(llama(), [entry.site.name for entry in widest]).expand()
    assert {r for r in plus.ranks.values() if r} == {2 * widest[0].lora_r}
    assert plus.parameters == sum(entry.site.parameters(2 * entry.lora_r) for entry in widest) > plan.lora_parameters


# -- the config ------------------------------------------------------------------------------------------------------


def test_equal_ranks_make_one_r_and_no_patterns():
    config = plan_of(llama(), [V1, UP1, Q0]).to_lora_config()
    assert config.target_modules == {V1, UP1, Q0}
    assert (config.r, config.lora_alpha) == (4, 8)
    assert type(config.lora_alpha) is int
    assert config.rank_pattern == config.alpha_pattern == {}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_ranks_and_strengths_in_the_model_are_those_of_the_plan(plus, use_rslora):
    patterns = {"rank_pattern": {"v_proj": 2, "up_proj": 12}, "alpha_pattern": {"q_proj": 24}}
    plan = plan_of(llama(), [Q0, V0, V1, UP1], use_rslora=use_rslora, **patterns)
    plan = plan.expand() if plus else plan
    assert len({entry.r for entry in plan.entries if entry.r}) == 3
    layers = lora_layers(plan.attach(llama()))
    assert {name: layer.r["default"] for name, layer in layers.items()} == {n: plan.ranks[n] for n in plan.names}
    for entry in plan.entries:
        if entry.r:
            strength = entry.alpha / (sqrt(entry.r) if use_rslora else entry.r)
            assert layers[entry.site.name].scaling["default"] == pytest.approx(strength)


def test_patterns_reach_no_site_but_their_own():
    wanted = {"lin0": 2, "tail.lin0": 3, "tailxlin0": 5, "layers.1": 6, "layers.11": 7, "layers.0": 1, "layers.10": 9}
    # The user's own patterns are anchored here, so that the plan starts from the wanted ranks.
    user = {"^" + name.replace(".", r"\."): r for name, r in wanted.items()}
    plan = plan_of(Lookalikes(), list(wanted), rank_pattern=user)
    assert adapters(plan.attach(Lookalikes())) == wanted
    # Names as they are would mix them up: the first key that fits the end of a name wins.
    careless = LoraConfig(r=1, target_modules=list(wanted), rank_pattern=wanted)
    assert adapters(get_peft_model(Lookalikes(), careless))["tail.lin0"] == wanted["lin0"]
    dotted = LoraConfig(r=1, target_modules=list(wanted), rank_pattern={"^tail.lin0": 3, "^tailxlin0": 5})
    assert adapters(get_peft_model(Lookalikes(), dotted))["tailxlin0"] == 3


def test_a_kept_name_that_ends_a_dropped_name_does_not_reach_it():
    plan = plan_of(Lookalikes(), ["lin0", "layers.1"])
    assert adapters(plan.attach(Lookalikes())) == {"lin0": 4, "layers.1": 4}


def test_a_failed_attach_leaves_the_model_as_it_was():
    model = Lookalikes()
    try:
        plan_of(model, ["lin0"]).attach(model)
    except PlanMismatchError:
        assert adapters(model) == {}
    else:
        assert adapters(model) == {"lin0": 4}


def test_overrides_change_the_users_fields_and_never_the_plan():
    plan = plan_of(llama(), [V0], lora_dropout=0.1)
    assert plan.to_lora_config().lora_dropout == 0.1
    assert plan.to_lora_config(lora_dropout=0.3, use_dora=True).lora_dropout == 0.3
    assert plan.attach(llama(), init_lora_weights=False).peft_config["default"].init_lora_weights is False
    for field, value in {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": [Q0],
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "exclude_modules": [V0],
    }.items():
        with pytest.raises(OptionError, match=field):
            plan.to_lora_config(**{field: value})


def test_a_field_that_peft_does_not_know_is_named():
    with pytest.raises(PlanError, match="frob"):  # a file of another PEFT version, or an edited one
        flat_plan(3, [1], lora={"frob": 1}).to_lora_config()


def test_a_plan_that_keeps_nothing_has_no_config():
    with pytest.raises(PlanError, match="keeps no site"):
        flat_plan(3, []).to_lora_config()


# -- in a model ------------------------------------------------------------------------------------------------------

V_AND_O = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(12) for name in ("o", "v")]


def test_attach_adapts_exactly_the_planned_sites_and_nothing_wraps_the_dropped():
    plan = plan_of(llama(), [V0, UP1])
    model = plan.attach(llama())
    assert adapters(model) == {V0: 4, UP1: 4}
    base = model.get_base_model()
    assert all(type(base.get_submodule(name)) is nn.Linear for name in plan.ranks if name not in plan.names)
    assert {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}" for name in plan.names
    }
    fresh = get_peft_model(llama(), plan.to_lora_config())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in fresh.named_parameters()]


def test_fresh_adapters_change_nothing_yet():
    plan = plan_of(llama(), [V0, UP1])
    assert logits(plan.attach(llama())).equal(logits(llama()))
    assert not logits(plan.attach(llama(), init_lora_weights=False)).equal(logits(llama()))


def test_the_saved_config_holds_full_names_where_peft_would_shorten_them(tmp_path):
    plan = plan_of(llama(12), V_AND_O)
    shortened = get_peft_model(llama(12), plan.to_lora_config())
    assert shortened.peft_config["default"].target_modules == {"o_proj", "v_proj"}  # also fits other models' layers
    model = plan.attach(llama(12))
    assert adapters(model) == adapters(shortened) == dict.fromkeys(V_AND_O, 4)
    plan.save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(V_AND_O)
    assert saved["peft_type"] == "LORA"
    assert AdapterPlan.load(tmp_path / "adapter" / "plan.json") == plan
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}.lora_{m}.weight" for name in V_AND_O for m in "AB"}


STOCK = """
import sys
class NoWeightLora:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "weightlora":
            raise ImportError("not on this machine")
sys.meta_path.insert(0, NoWeightLora())
try:
    import weightlora
    sys.exit("weightlora is still there")
except ImportError:
    pass
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, *adapters = sys.argv[1:]
ids = torch.arange(16).reshape(2, 8)
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        loaded = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    save_file({"loaded": loaded, "merged": merged}, adapter + "/logits.safetensors")
"""


@pytest.mark.slow
def test_a_saved_adapter_gives_the_same_logits_where_weightlora_is_not_installed(tmp_path):
    base = llama(12)
    base.save_pretrained(tmp_path / "base")
    uniform = plan_of(base, V_AND_O)
    patterned = plan_of(base, [*V_AND_O, UP1], rank_pattern={"v_proj": 2}, use_rslora=True).expand()
    expected = {}
    for name, plan in {"uniform": uniform, "patterned": patterned}.items():
        model = plan.attach(llama(12), init_lora_weights=False)  # B is not 0, so the adapters count
        plan.save_adapter(model, tmp_path / name)
        expected[name] = logits(model)
        assert (expected[name] - logits(base)).abs().max() > 1e-3
    folders = [str(tmp_path / name) for name in ("base", *expected)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK, *folders], check=True, capture_output=True)
    for name, wanted in expected.items():
        found = load_file(tmp_path / name / "logits.safetensors")
        torch.testing.assert_close(found["loaded"], wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["merged"], wanted, rtol=0, atol=1e-5)


def test_a_trained_adapter_is_not_saved_under_a_plan_that_it_does_not_carry(tmp_path):
    model = plan_of(llama(), [V0]).attach(llama())
    with pytest.raises(PlanMismatchError):
        plan_of(llama(), [V1]).save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import os, resource, signal
from torch import nn
from peft import LoraConfig
from weightlora.errors import OutputError
from weightlora.plan.plan import make_plan
from weightlora.model.sites import find_sites
model, lora = nn.Sequential(nn.Linear(500, 500)), LoraConfig(r=32)
plan = make_plan(find_sites(model, lora).sites, lora, ["0"])
attached = plan.attach(model)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails as it does on a full disk
for limit in (50_000, 500_000):  # the tensors have 128,000 bytes, what PEFT writes beside them far fewer
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        plan.save_adapter(attached, "adapter")
    except Exception as error:
        print(type(error).__name__, end=" ")
    print(*os.listdir())
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_tensors_is_an_output_error_and_leaves_nothing(tmp_path):
    arguments = [sys.executable, "-W", "ignore", "-c", FULL_DISK]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["OutputError ", "adapter"]


# -- plan and model belong together ----------------------------------------------------------------------------------


def mismatch(check) -> str:
    with pytest.raises(PlanMismatchError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_check_passes_the_model_that_carries_the_plan_and_any_adapter_name():
    plan = plan_of(llama(), [V0, UP1])
    plan.check(plan.attach(llama()))
    plan.check(get_peft_model(llama(), plan.to_lora_config(), adapter_name="other"), adapter="other")


def test_check_names_what_is_missing_what_is_extra_and_what_has_another_rank():
    plan = plan_of(llama(), [V0, UP1])
    text = mismatch(lambda: plan.check(plan_of(llama(), [V0, V1, UP1]).attach(llama())))
    assert f"{V1}: rank 4, not planned" in text
    assert UP1 not in text
    text = mismatch(lambda: plan.check(plan_of(llama(), [V0]).attach(llama())))
    assert f"{UP1}: no adapter, planned rank 4" in text
    assert V0 not in text
    text = mismatch(lambda: plan.check(plan_of(llama(), [V0, UP1], rank_pattern={"v_proj": 2}).attach(llama())))
    assert f"{V0}: rank 2, planned 4" in text
    assert UP1 not in text
    text = mismatch(lambda: plan.check(llama()))
    assert f"{V0}: no adapter" in text
    assert f"{UP1}: no adapter" in text


def test_check_sites_names_what_another_model_lacks_or_has_in_another_shape():
    plan = plan_of(llama(), [V0])
    plan.check_sites(llama())
    plan.check_sites(llama(3))  # more layers do no harm
    plan.check_sites(plan.attach(llama()))  # seen through PEFT's wrappers
    text = mismatch(lambda: plan.check_sites(llama(1)))
    assert "model.layers.1.mlp.down_proj: not in the model" in text
    assert "; and 2 more" in text  # seven sites are missing, five are named
    assert f"{Q0}: 32→32 in the model, 16→16 in the plan" in mismatch(
        lambda: plan_of(llama(), [Q0], target_modules=["q_proj"]).check_sites(llama(hidden=32))
    )
    for model in (llama(1), Lookalikes()):
        mismatch(lambda model=model: plan.attach(model))
        assert adapters(model) == {}, "nothing was attached"


def test_the_fingerprint_is_that_of_names_and_shapes_alone():
    plan = plan_of(llama(), [V0])
    assert plan.fingerprint == plan_of(llama(), [UP1], r=64).expand().fingerprint
    assert plan.fingerprint != plan_of(llama(3), [V0]).fingerprint
    assert plan.fingerprint != plan_of(llama(hidden=32), [V0]).fingerprint
