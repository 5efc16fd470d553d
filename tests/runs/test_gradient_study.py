"""``weightlora analyse dot-product``: numbers against whole gradients, overlap against counting, mistakes."""

import itertools
import json
import re
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from selecting import fingerprint
from transformers import BertConfig, BertForSequenceClassification

from weightlora.cli import main
from weightlora.methods.dot_product import dot_products
from weightlora.model.layers import lora_layers
from weightlora.model.restore import seeded, untouched
from weightlora.model.sites import Site, find_sites
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.runs.gradient_study import DotProducts, Overlap, draw_bars, overlap_text
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import make_trainer
from weightlora.selection.stage import attach_plain_lora
from weightlora.trainer.loader import micro_batches

STEPS, HEAD_STEPS, RATE, SEED = 3, 2, 1e-2, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny classifier on disk, without dropout, so that a second training can be the same."""
    path = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **still)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def words(folder, output, **changed):
    options = {
        "model_name_or_path": folder,
        "task": "rotten_tomatoes",
        "max_train_samples": 64,
        "max_eval_samples": 16,
        "max_seq_length": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "seed": SEED,
        "adapters": 5,
        "steps": STEPS,
        "rule": "first_order",
        "rule_options": f"head_steps={HEAD_STEPS}",
        "lora_r": 2,
        "lora_alpha": 6,
        "use_cpu": True,
        "lora_dropout": 0.3,
        "output_dir": output,
        **changed,
    }
    return ["analyse", "dot-product", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """The folder that one run of the command left."""
    output = tmp_path_factory.mktemp("analyse")
    assert main(words(folder, output)) == 0
    return output


def trained(parameters, model, rows):
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    for row in rows:
        model(**row).loss.backward()
        optimizer.step()
        model.zero_grad()


def slow_products(base, rows):
    """One training a site, then the whole gradient of W0 times the whole update, summed over all entries."""
    lora = LoraConfig(r=2, lora_alpha=6, task_type="SEQ_CLS")
    sites, products = find_sites(base, lora).sites, {}
    for site in sites:
        model = deepcopy(base)
        with untouched(model, seed=SEED), torch.enable_grad():
            attached = attach_plain_lora(model, lora, sites)
            head = [p for n, p in attached.named_parameters() if p.requires_grad and "lora_" not in n]
            trained(head, attached, rows[:HEAD_STEPS])
            layers = lora_layers(attached)
            a, b = (getattr(layers[site.name], m)["default"].weight for m in ("lora_A", "lora_B"))
            trained([a, b, *head], attached, rows[HEAD_STEPS:])
            update = 6 / 2 * (b @ a).detach()
            for layer in layers.values():
                layer.lora_B["default"].weight.data.zero_()
            whole = layers[site.name].base_layer.weight.requires_grad_()
            for row in rows[HEAD_STEPS:]:
                (attached(**row).loss / STEPS).backward()
            products[site.name] = float((whole.grad * update).sum())
    return products


@pytest.mark.slow
def test_the_products_are_those_of_whole_gradients_and_updates(found, folder, tmp_path):
    _, trainer, _ = make_trainer(read_recipe(words=words(folder, tmp_path)[2:]))
    base = trainer.model.base_model.unload()
    with seeded(SEED):
        rows = list(itertools.islice(micro_batches(trainer), HEAD_STEPS + STEPS))
    slow = slow_products(base, rows)
    sites = json.loads((found / "dot_product.json").read_text())["sites"]
    assert {site["name"]: site["product"] for site in sites} == pytest.approx(slow, rel=1e-3)
    assert len(slow) == 12


def test_what_is_written_says_what_the_plan_and_the_largest_share(found):
    plan = AdapterPlan.load(found / "plan.json")
    data = json.loads((found / "dot_product.json").read_text())
    kept = {site["name"] for site in data["sites"] if site["kept"]}
    assert kept == set(plan.names)
    ranked = sorted(data["sites"], key=lambda site: -abs(site["product"]))
    largest = {site["name"] for site in data["sites"] if site["largest"]}
    assert largest == {site["name"] for site in ranked[:5]}
    shared = len(kept & largest)
    assert data["overlap"]["shared"] == shared
    assert data["overlap"]["jaccard"] == pytest.approx(shared / len(kept | largest))
    assert data["overlap"]["by_chance"] == pytest.approx(25 / 12)
    assert data["settings"]["learning_rate"] == RATE
    assert (found / "dot_product.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in found.glob("[!.]*")) == ["dot_product.json", "dot_product.png", "plan.json"]


def test_a_plan_that_is_given_is_the_one_compared_with(folder, tmp_path, capsys):
    base = BertForSequenceClassification.from_pretrained(folder)
    sites = find_sites(base, LoraConfig(task_type="SEQ_CLS")).sites
    chosen = [site.name for site in sites][:4]
    make_plan(sites, LoraConfig(r=2), chosen, rule="by_hand").save(tmp_path / "mine.json")
    assert main(words(folder, tmp_path / "out", plan=tmp_path / "mine.json", steps=1)) == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "dot_product.json").read_text())
    assert [site["name"] for site in data["sites"] if site["kept"]] == chosen
    assert f"{data['overlap']['shared']} of the 4 sites with the largest products are kept by by_hand" in printed
    assert f"at random: {16 / 12:.1f} of 4 (K²/n, n = 12)" in printed
    assert printed.count("★") == 4 + 2, "title and header explain the sign"


def test_the_model_is_as_it_was(folder):
    model = BertForSequenceClassification.from_pretrained(folder)
    lora = LoraConfig(r=2, task_type="SEQ_CLS")
    sites = find_sites(model, lora).sites
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 1])}
    before = fingerprint(model)
    with pytest.warns(match="1 batches for 2 scoring steps"):
        dot_products(model, lora, sites, [batch], steps=1, head_steps=1, alone=True, learning_rate=RATE)
    assert fingerprint(model) == before


# -- the overlap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (7, 5), (4, 1)])
def test_what_a_choice_by_chance_shares_is_counted_over_all_choices(n, k):
    best = set(range(k))
    shared = [len(best & set(lot)) for lot in itertools.combinations(range(n), k)]
    for mine in range(k + 1):
        overlap = Overlap(n, k, mine)
        assert overlap.by_chance == pytest.approx(sum(shared) / len(shared))
        assert overlap.jaccard_by_chance == pytest.approx(sum(s / (2 * k - s) for s in shared) / len(shared))
        assert overlap.chance == pytest.approx(sum(s >= mine for s in shared) / len(shared))


#: Projection, how many of its four sites the plan keeps, size of the products.
KINDS = (("wide", 3, 10.0), ("narrow", 1, 3.0), ("idle", 0, 0.1))


def planned(*rows):
    sites = [Site(name, 4, 4) for name, _, _ in rows]
    plan = make_plan(sites, LoraConfig(r=2), [name for name, keeps, _ in rows if keeps])
    return DotProducts(plan, {name: product for name, _, product in rows})


def test_the_largest_are_those_of_the_greatest_magnitude_and_ties_go_by_name():
    found = planned(("a", True, -3.0), ("b", False, 1.0), ("c", True, -1.0), ("d", False, 0.5))
    assert found.largest == ("a", "b")
    assert found.overlap == Overlap(n=4, k=2, shared=1)
    assert overlap_text(found).splitlines()[0].endswith("Jaccard 0.33")


def test_by_chance_within_is_counted_over_all_choices_that_keep_as_many_of_each_projection():
    rows = [(f"layers.{i}.{kind}", i < keeps, size * (i + 1)) for kind, keeps, size in KINDS for i in range(4)]
    found = planned(*sorted(rows))
    lots = itertools.product(
        *(itertools.combinations([f"layers.{i}.{kind}" for i in range(4)], k) for kind, k, _ in KINDS)
    )
    shared = [len(set(found.largest) & {name for part in lot for name in part}) for lot in lots]
    assert found.by_chance_within == pytest.approx(sum(shared) / len(shared))
    assert found.by_chance_within > found.overlap.by_chance, "the larger projection is the one kept"


def test_products_that_are_all_zero_can_be_drawn(tmp_path):
    draw_bars(planned(("a", True, 0.0), ("b", False, 0.0)), tmp_path / "bars.png")
    assert [path.name for path in tmp_path.iterdir()] == ["bars.png"]


# -- mistakes --------------------------------------------------------------------------------------------------------


def failure(capsys, *arguments):
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert len(re.findall(r"weightlora: error: [^\n]+\n", error)) == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"adapter": 5}, "unknown option '--adapter=5' (closest: 'adapters')"),
        ({"task": "film"}, "film"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
        ({"adapters": 12}, "the plan keeps all of 12 sites, so that any choice agrees with it; lower adapters"),
        ({"method": "melora"}, "the plan keeps all of 12 sites"),
    ],
)
def test_a_mistake_is_one_line(changed, text, folder, tmp_path, capsys):
    options = {"method_options": "n_mini=1"} if changed.get("method") == "melora" else {}
    assert text in failure(capsys, *words(folder, tmp_path, **changed, **options))
    assert not (tmp_path / "dot_product.json").exists()


def test_a_plan_of_other_candidates_is_refused(folder, tmp_path, capsys):
    base = BertForSequenceClassification.from_pretrained(folder)
    some = find_sites(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])).sites
    make_plan(some, LoraConfig(r=2), [some[0].name]).save(tmp_path / "some.json")
    text = failure(capsys, *words(folder, tmp_path, plan=tmp_path / "some.json"))
    assert "the plan chose among 4 sites and the recipe has 12" in text


def test_a_study_has_to_be_named(capsys):
    assert "study" in failure(capsys, "analyse")
