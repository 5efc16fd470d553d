"""Plans in low precision, with checkpointing, accumulation and torch.compile, against the plain fp32 one."""

from contextlib import nullcontext
from copy import deepcopy
from itertools import count

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from scipy.stats import hypergeom
from selecting import ruled
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import weightlora
from weightlora.cli import main
from weightlora.errors import SiteError, WeightLoraWarning
from weightlora.methods import make_method
from weightlora.model.layers import lora_layers
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import train
from weightlora.tasks.classification import encode
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.tasks.embedded import rotten_tomatoes
from weightlora.tasks.pretrained import load_pretrained

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "save_strategy": "no"}
FEW = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "seed": 3, **QUIET}
# The head stays out: transformers would quantise it, and it is fresh and trained whole.
EIGHT = {"load_in_8bit": True, "llm_int8_skip_modules": ["classifier"]}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["classifier"]}
RULES = [ruled(head_steps=2, steps=2), ruled("paper", steps=4)]  # four steps each
RULE_NAMES = ["default", "paper"]
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def review_rows(tokenizer):
    return encode(tokenizer, rotten_tomatoes(train=192, test=64).train, max_length=24)


def load(quantised=None, **options):
    """MiniLM with a fresh head, as a user of bitsandbytes prepares it."""
    if quantised is not None:
        options["quantization_config"] = BitsAndBytesConfig(**quantised)
    base = load_pretrained("AutoModelForSequenceClassification", minilm_folder(), seed=0, num_labels=2, **options)
    return base if quantised is None else prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


@pytest.fixture(scope="module")
def make_trainer(tokenizer, review_rows, tmp_path_factory):
    """Trainers with LoRA on the 36 linear layers of MiniLM's six blocks."""
    folder, number = tmp_path_factory.mktemp("runs"), count()

    def make(base, rows=review_rows, **arguments):
        target = r".*\.layer\.\d+\..*(query|key|value|dense)"
        torch.manual_seed(0)
        trainer = Trainer(
            model=get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=target, task_type="SEQ_CLS")),
            args=TrainingArguments(output_dir=str(folder / str(next(number))), **{**FEW, **arguments}),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.model_accepts_loss_kwargs = False  # BERT's loss is a mean over rows, whatever its **kwargs promise
        return trainer

    return make


@pytest.fixture(scope="module")
def fp32(make_trainer):
    """The plan that low precision is compared with."""
    return weightlora.select_for(make_trainer(load()), **ruled(adapters=18, head_steps=4, steps=8))


@pytest.fixture(scope="module")
def other_draws(make_trainer, review_rows):
    """fp32 plans of another question: other batches, or labels that mean nothing."""
    labels = torch.tensor([row["labels"] for row in review_rows])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))].tolist()
    shuffled = [{**row, "labels": label} for row, label in zip(review_rows, labels, strict=True)]
    trainers = [make_trainer(load(), seed=4), make_trainer(load(), rows=shuffled)]
    return [weightlora.select_for(trainer, **ruled(adapters=18, head_steps=4, steps=8)) for trainer in trainers]


def chance(n, k):
    """The Jaccard similarity that 99.9 % of the random choices of k of n do not exceed."""
    overlap = hypergeom.ppf(0.999, n, k, k)
    return overlap / (2 * k - overlap)


def scores(plan):
    return torch.tensor(list(plan.scores.values()), dtype=torch.float64)


def distance(plan, reference):
    """How much of the scores' sum moved, from 0 (nothing)."""
    return float((scores(plan) - scores(reference)).abs().sum() / scores(reference).sum())


# -- where a plan may differ -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loading", "arguments", "dtype"),
    [
        ({"quantised": EIGHT}, {}, torch.int8),
        ({"quantised": FOUR}, {}, torch.uint8),
        ({}, {"bf16": True}, torch.float32),
        ({"dtype": torch.bfloat16}, {}, torch.bfloat16),
    ],
    ids=["8bit", "4bit", "bf16-autocast", "bf16-weights"],
)
def test_low_precision_keeps_the_sites(make_trainer, fp32, other_draws, record_property, loading, arguments, dtype):
    trainer = make_trainer(load(**loading), **arguments)
    assert {layer.get_base_layer().weight.dtype for layer in lora_layers(trainer.model).values()} == {dtype}
    plan = weightlora.select_for(trainer, **ruled(adapters=18, head_steps=4, steps=8))
    assert plan.history != fp32.history  # the precision did reach the scoring
    record_property("jaccard", plan.jaccard(fp32))
    record_property("distance", distance(plan, fp32))
    assert len(plan.entries) == 36
    assert plan.jaccard(fp32) > chance(36, 18)
    # Most of that is the model's: other batches keep nearly the same sites as well. So the scores must have moved
    # less than other batches or meaningless labels move them, by half at least.
    assert distance(plan, fp32) < min(distance(other, fp32) for other in other_draws) / 2


@pytest.mark.slow
def test_the_bars_keep_out_what_is_no_rounding(fp32, other_draws, minilm):
    """Negative controls: random choices, and the noise that the second bar is made of."""
    # P(overlap > 14) < 0.001 <= P(overlap > 13): 14 of 18 in common are 14 of the 22 sites in the union.
    assert chance(36, 18) == pytest.approx(14 / 22)
    lora = LoraConfig(r=8, task_type="SEQ_CLS")
    for seed in range(20):
        method = make_method("random", adapters=18, seed=seed)
        minilm = method.attach(minilm, lora, (), 0).unload()
        drawn = method.plan
        assert drawn.ranks.keys() == fp32.ranks.keys()
        assert drawn.jaccard(fp32) <= chance(36, 18)
    assert all(distance(other, fp32) > 0.1 for other in other_draws)  # far above any rounding
    assert distance(fp32, fp32) == 0


# -- where it may not ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RULES, ids=RULE_NAMES)
def plain(request, make_trainer):
    """The options of a rule and the plan that it finds without checkpointing."""
    return request.param, weightlora.select_for(make_trainer(load()), **request.param)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("settings", "again"),
    [(None, 6), ({"use_reentrant": True}, 6), ({"every_n_layers": 2}, 3)],
    ids=["default", "reentrant", "every-second"],
)
def test_checkpointing_changes_nothing(make_trainer, plain, settings, again):
    """The recomputed numbers are those of the first pass, dropout's included: the same plan bit for bit."""
    options, expected = plain
    base, calls = load(), []
    trainer = make_trainer(base, activation_checkpointing=True, activation_checkpointing_kwargs=settings)
    for layer in base.bert.encoder.layer:  # a layer's own hooks stay outside of what is run again
        layer.intermediate.register_forward_pre_hook(lambda *_: calls.append(1))
    reentrant = settings == {"use_reentrant": True}
    with pytest.warns(WeightLoraWarning, match="reentrant here") if reentrant else nullcontext():
        plan = weightlora.select_for(trainer, **options)
        assert plan.history == expected.history
        assert plan.names == expected.names
        # Four steps through six layers, the paper's twice each, and those that were run again. Without reentrant
        # checkpointing that is none where the head alone is trained.
        alone = 0 if reentrant else plan.options["head_steps"]
        steps = 8 if plan.options.get("order") == "alternating" else 4
        assert len(calls) == steps * 6 + (steps - alone) * again
        trainer.train()
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(trainer.model).values())


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("options", RULES, ids=RULE_NAMES)
def test_four_batches_of_eight_are_one_of_thirty_two(make_trainer, options):
    """In double precision, where the order of a sum is no matter: only the scores themselves are fp32."""

    def plan(rows, accumulate):
        base = load(**WITHOUT_DROPOUT).double()
        base.bert.encoder.layer = base.bert.encoder.layer[:2]  # to save time
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulate}
        return weightlora.select_for(make_trainer(base, **sizes), **options)

    whole, parts = plan(32, 1), plan(8, 4)
    assert parts.names == whole.names
    # A score is a tree of fp32 sums over positive numbers, or T fp32 steps: 16 levels of one rounding each.
    torch.testing.assert_close(scores(parts), scores(whole), rtol=16 * 2**-24, atol=0)
    other = plan(8, 1)
    assert not torch.allclose(scores(other), scores(whole), rtol=1e-2)  # negative control: eight rows are not 32


def test_a_compiled_model_is_refused_before_its_plan_has_names_of_its_own(make_trainer, minilm, review_batches):
    with pytest.raises(SiteError, match="is compiled"):
        weightlora.select(torch.compile(minilm), review_batches)
    trainer = make_trainer(minilm)
    trainer.model = trainer.model_wrapped = torch.compile(trainer.model)
    with pytest.raises(SiteError, match="is compiled"):
        weightlora.select_for(trainer)


# -- weightlora train ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_folder(tokenizer, tmp_path_factory):
    """The two lowest layers of MiniLM without a head and without dropout, as a user's model on disk."""
    folder = tmp_path_factory.mktemp("minilm")
    base = load(**WITHOUT_DROPOUT).bert
    base.encoder.layer = base.encoder.layer[:2]
    base.config.num_hidden_layers = 2
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Trained(TrainerCallback):
    """Keeps the model that was trained."""

    def on_train_end(self, _args, _state, _control, model=None, **_):
        self.model = deepcopy(model)


def command(small_folder, output, **options):
    rows = {"max_train_samples": 64, "max_eval_samples": 8, "max_seq_length": 16}
    short = {
        "adapters": 6,
        "rule": "first_order",
        "rule_options": "head_steps=2",
        "steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    options = {**FEW, **rows, **short, "model_name_or_path": small_folder, "output_dir": output, **options}
    return [f"--{name}={value}" for name, value in options.items()]


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("options", "loading"),
    [
        ({"load_in_8bit": True}, {"quantization_config": BitsAndBytesConfig(**EIGHT)}),
        ({"load_in_4bit": True}, {"quantization_config": BitsAndBytesConfig(**FOUR)}),
        ({"bf16": True}, {}),
        ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
    ],
    ids=["8bit", "4bit", "bf16-autocast", "bf16-weights"],
)
def test_the_command_ends_in_a_stock_adapter(small_folder, tmp_path, review_batches, options, loading):
    trained = Trained()
    results = train(read_recipe(words=command(small_folder, tmp_path / "run", **options)), callbacks=[trained])
    assert results["steps"] == 2
    assert results["adapters"] == 6  # half of two layers' six
    assert any(weight.any() for name, weight in trained.model.named_parameters() if "lora_B" in name)

    base = AutoModelForSequenceClassification.from_pretrained(small_folder, num_labels=2, **loading)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    expected = logits(trained.model, review_batches[0])
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):  # as accelerate made the trained one
        actual = logits(model, review_batches[0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # the same operations
    with model.disable_adapter():
        assert not torch.allclose(logits(model, review_batches[0]), expected, rtol=0, atol=1e-3)  # negative control


@pytest.mark.slow
def test_the_command_compiles_what_it_planned(small_folder, tmp_path, review_batches, monkeypatch):
    """With the backend that needs no C++ compiler; the scoring, whose structure is gone afterwards, is not compiled."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments write to it: put it back afterwards
    stock, compiled_sites = torch.compile, []

    def remember(model, **options):
        if not isinstance(model, torch.nn.Identity):  # with which the options are tried
            compiled_sites.append(set(lora_layers(model)))
        return stock(model, **options)

    monkeypatch.setattr(torch, "compile", remember)

    def run(folder, **options):
        trained = Trained()
        return trained, train(read_recipe(words=command(small_folder, folder, **options)), callbacks=[trained])

    _, plain = run(tmp_path / "plain", max_steps=3)
    trained, compiled = run(tmp_path / "compiled", max_steps=3, torch_compile_backend="aot_eager")
    plans = [weightlora.AdapterPlan.load(tmp_path / name / "plan.json") for name in ("plain", "compiled")]
    assert plans[0] == plans[1]
    assert compiled_sites == [set(plans[1].names)]
    losses = [torch.tensor([loss for _, loss in results["losses"]]) for results in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-4)  # as they are logged, to four digits
    assert losses[0].unique().numel() == 3  # negative control: another step has another loss

    base = AutoModelForSequenceClassification.from_pretrained(small_folder, num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "compiled" / "adapter"))
    assert set(lora_layers(model)) == set(plans[1].names)
    expected = logits(trained.model, review_batches[0])
    torch.testing.assert_close(logits(model, review_batches[0]), expected, rtol=0, atol=1e-6)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("given", "used"), [({}, "sdpa"), ({"attn_implementation": "eager"}, "eager")])
def test_the_command_trains_with_the_attention_that_is_asked_for(small_folder, tmp_path, given, used):
    trained = Trained()
    train(read_recipe(words=command(small_folder, tmp_path / "run", **given)), callbacks=[trained])
    assert trained.model.config._attn_implementation == used


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attn_implementation": "fast"}, 'Specified `attn_implementation="fast"` is not supported'),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
        ({"dtype": "float31"}, "dtype='float31' is not allowed"),
        ({"load_in_8bit": True}, "requires bitsandbytes: `pip install"),
    ],
)
def test_a_precision_that_cannot_be_is_one_line(small_folder, tmp_path, capsys, monkeypatch, options, text):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_8bit.is_bitsandbytes_available", lambda: False)
    assert main(["train", *command(small_folder, tmp_path / "run", **options)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weightlora: error")]
    assert text in line
    assert not (tmp_path / "run" / "plan.json").exists()
