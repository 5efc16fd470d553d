"""select_for(trainer) on the four trainers; the line is the only difference to plain LoRA."""

import json
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from selecting import ruled
from torch.utils.data import IterableDataset
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import weightlora
from weightlora.errors import OptionError, SelectionError, WeightLoraWarning
from weightlora.fast.enable import fast_coverage, fast_dropout
from weightlora.model.layers import lora_layers
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.rules.first_order import FirstOrder
from weightlora.selection.rules.paper import StoIHT
from weightlora.tasks.classification import encode
from weightlora.tasks.embedded import rotten_tomatoes, smollm2
from weightlora.trainer.attach import adopt

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "seed": 3}
FEW = {"bf16": False, "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", **QUIET}
PAIRS = [(a, b) for a in range(10) for b in range(9)]
#: A short scoring whose weights the training starts from.
WARM = {"rule": StoIHT(head_steps=1), "adapters": 3, "steps": 3, "learning_rate": 2e-3, "warm_start": True}
QUESTIONS = [f"What is {a} plus {b}?" for a, b in PAIRS]
ANSWERS = [f"{a + b}" for a, b in PAIRS]


@pytest.fixture(scope="session")
def review_rows(tokenizer):
    return encode(tokenizer, rotten_tomatoes(train=192, test=64).train, max_length=16)


@pytest.fixture(scope="session")
def chat_tokenizer():
    return AutoTokenizer.from_pretrained(str(smollm2().parent), gguf_file=smollm2().name)


def classifier(minilm, tokenizer, rows, folder, lora=True, **arguments):
    """A transformers ``Trainer`` on MiniLM with LoRA on queries, values and the feed-forward layers."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "intermediate.dense"], task_type="SEQ_CLS")
    torch.manual_seed(0)
    return Trainer(
        model=get_peft_model(minilm, config) if lora else minilm,
        args=TrainingArguments(output_dir=str(folder), **{**FEW, **arguments}),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


@pytest.fixture
def make_classifier(minilm, tokenizer, review_rows, tmp_path):
    """Trainers on copies of one model: the two lowest layers of MiniLM, to save time."""
    minilm.bert.encoder.layer = minilm.bert.encoder.layer[:2]

    def make(folder="run", lora=True, **arguments):
        return classifier(deepcopy(minilm), tokenizer, review_rows, tmp_path / folder, lora, **arguments)

    return make


def llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def sft(tokenizer, folder, **arguments):
    rows = [{"prompt": q, "completion": " " + a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return SFTTrainer(
        model=llama(tokenizer),
        args=SFTConfig(output_dir=str(folder), max_length=32, **{**FEW, **arguments}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=deepcopy(LORA),
    )


def dpo(tokenizer, folder, wrapped=False):
    rows = [{"prompt": q, "chosen": " " + a, "rejected": " no"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    model = get_peft_model(llama(tokenizer), deepcopy(LORA)) if wrapped else llama(tokenizer)
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), max_length=48, **FEW),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if wrapped else deepcopy(LORA),
    )


def bart(tokenizer):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    special = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "decoder_start_token_id": 102}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=tokenizer.vocab_size, **sizes, **special, **heads))


def seq2seq(tokenizer, folder):
    base = bart(tokenizer)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    rows = [tokenizer(q, text_target=a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    rows = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows]
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **FEW),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=base),
    )


@pytest.fixture(params=["Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer", "DPOTrainer on a PeftModel"])
def kind(request):
    return request.param


@pytest.fixture
def any_trainer(kind, make_classifier, tokenizer, chat_tokenizer, tmp_path):
    """Makes one of the four trainers, the same one each time."""

    def make(folder="run"):
        torch.manual_seed(0)
        path = tmp_path / folder
        if kind == "Trainer":
            return make_classifier(folder)
        if kind == "Seq2SeqTrainer":
            return seq2seq(tokenizer, path)
        if kind == "SFTTrainer":
            return sft(chat_tokenizer, path)
        return dpo(chat_tokenizer, path, wrapped="PeftModel" in kind)

    return make


@pytest.fixture
def base(kind, minilm, tokenizer, chat_tokenizer):
    """The base model of that trainer, which no trainer has touched."""
    minilm.bert.encoder.layer = minilm.bert.encoder.layer[:2]
    models = {"Trainer": lambda: deepcopy(minilm), "Seq2SeqTrainer": lambda: bart(tokenizer)}
    return models.get(kind, lambda: llama(chat_tokenizer))()


def first_batch(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.sampled(2)
def test_the_line_ends_in_a_planned_stock_adapter(any_trainer, base, tmp_path):
    trainer = any_trainer("run")
    the_users, all_sites = trainer.model, set(lora_layers(trainer.model))
    plan = weightlora.select_for(trainer, adapters=len(all_sites) // 2, rule=FirstOrder(head_steps=0))
    assert 0 < 2 * len(plan.names) == len(all_sites)
    assert trainer.model is the_users  # whoever holds the model holds the planned one
    assert set(lora_layers(trainer.model)) == set(plan.names) < all_sites
    assert AdapterPlan.load(tmp_path / "run" / "plan.json") == plan
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(_weight.any() for n, _weight in trainer.model.named_parameters() if "lora_B" in n)

    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == list(plan.names)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {n.replace(".default", "").replace("modules_to_save.", "") for n in trained} == set(saved)
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)  # it was trained

    batch = first_batch(trainer)
    expected = logits(trainer.model, batch)
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert set(lora_layers(reloaded)) == set(plan.names)
    torch.testing.assert_close(logits(reloaded, batch), expected, rtol=0, atol=1e-5)
    with reloaded.disable_adapter():
        assert not torch.allclose(logits(reloaded, batch), expected, rtol=0, atol=1e-5)  # negative control


class Batches(TrainerCallback):
    """Remembers what the model was called with."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, _model, _args, kwargs):
        self.seen.append(kwargs["input_ids"].clone())


@pytest.mark.sampled(1)
def test_the_line_is_the_only_difference(any_trainer):
    """Without it: plain LoRA, which trains on the same batches in the same order."""
    runs = []
    for with_line in (False, True):
        trainer = any_trainer(f"run{with_line}")
        if with_line:
            weightlora.select_for(trainer, rule=FirstOrder(head_steps=0))
        before = torch.get_rng_state()
        seen = Batches(trainer.model).seen
        trainer.train()
        costs = {
            name: sum(part["default"].weight.numel() for part in (layer.lora_A, layer.lora_B))
            for name, layer in lora_layers(trainer.model).items()
        }
        runs.append((costs, before, seen))
    (everywhere, rng, batches), (kept, same_rng, same_batches) = runs
    assert 2 * len(kept) == len(everywhere)  # half of the adapters, as the paper recommends
    assert kept.items() <= everywhere.items()
    assert torch.equal(rng, same_rng)
    assert len(batches) == len(same_batches) > 0
    assert all(torch.equal(a, b) for a, b in zip(batches, same_batches, strict=True))
    assert not all(torch.equal(batches[0], b) for b in batches[1:])


@pytest.mark.parametrize("options", [{"rule": "first_order"}, {"rule": "paper"}], ids=["first_order", "paper"])
def test_the_plan_is_that_of_select_on_the_same_batches(make_classifier, options):
    trainer = make_classifier(learning_rate=2e-3)
    reference, lora = deepcopy(trainer.model), trainer.model.peft_config["default"]
    collate, batches = trainer.data_collator, []

    def remember(rows):
        batches.append(collate(rows))
        return batches[-1]

    trainer.data_collator = remember
    plan = weightlora.select_for(trainer, **options)
    same = weightlora.select(reference, batches, lora=lora, learning_rate=2e-3, seed=3, **options)
    assert plan.history == same.history
    assert plan == same
    others = weightlora.select(reference, batches[1:], lora=lora, learning_rate=2e-3, seed=3, **options)
    assert others.history != plan.history  # negative control


def test_the_scoring_leaves_no_trace_in_the_trainers_metrics(chat_tokenizer, tmp_path):
    """SFTTrainer's loss writes entropy and token accuracy down; the first log must not be about the scoring."""
    trainer = sft(chat_tokenizer, tmp_path)
    before = deepcopy(trainer._metrics)
    weightlora.select_for(trainer, rule="first_order")
    assert trainer._metrics == before
    trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader()))))
    assert trainer._metrics != before  # negative control


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def scores(trainer, **options):
    return torch.tensor(list(weightlora.select_for(trainer, **options).scores.values()))


def test_accumulation_gives_the_scores_of_one_large_batch(minilm, make_classifier):
    """4 × 4 rows are 1 × 16: the same gradients but for the order of fp32 sums."""
    options = ruled(head_steps=0, steps=6)
    without_dropout(minilm)
    whole = scores(make_classifier("a", per_device_train_batch_size=16), **options)
    parts = scores(make_classifier("b", per_device_train_batch_size=4, gradient_accumulation_steps=4), **options)
    # BERT's own loss takes no count of items, which the Trainer overlooks: its accumulated gradients are sums.
    torch.testing.assert_close(parts, 4 * whole, rtol=1e-4, atol=0)
    other = scores(make_classifier("c", per_device_train_batch_size=4), **options)
    assert not torch.allclose(other, whole, rtol=1e-2)  # negative control: four rows are not sixteen


@pytest.mark.slow
def test_accumulation_counts_tokens_as_the_training_does(chat_tokenizer, tmp_path):
    """Answers have one or two digits: a mean of micro-batch means would weigh tokens unequally."""

    def scored(folder, rows, accumulate):
        arguments = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulate}
        return scores(sft(chat_tokenizer, tmp_path / folder, **arguments), steps=6)

    whole = scored("a", 8, 1)
    torch.testing.assert_close(scored("b", 2, 4), whole, rtol=1e-4, atol=0)
    assert not torch.allclose(scored("c", 2, 1), whole, rtol=1e-2)  # negative control


def test_gradient_checkpointing_changes_nothing(make_classifier):
    plain = weightlora.select_for(make_classifier("a"), rule=FirstOrder(head_steps=0), steps=4)
    checkpointed = weightlora.select_for(
        make_classifier("b", gradient_checkpointing=True), rule=FirstOrder(head_steps=0), steps=4
    )
    assert checkpointed.history == plain.history


@pytest.mark.slow
def test_bf16_keeps_nearly_the_same_sites(make_classifier):
    plain = weightlora.select_for(make_classifier("a"), rule=FirstOrder(head_steps=0), steps=8)
    rounded = weightlora.select_for(make_classifier("b", bf16=True), rule=FirstOrder(head_steps=0), steps=8)
    assert rounded.history != plain.history  # the precision did reach the scoring
    assert plain.jaccard(rounded) >= 0.8


@pytest.mark.parametrize("fast", ["rank", None])
def test_the_fast_step_stays_on(make_classifier, fast):
    """Asked for, or enabled before: the line gives the model new adapters."""
    trainer = make_classifier()
    if fast is None:
        weightlora.enable_fast_lora(trainer.model, dropout="rank")
    plan = weightlora.select_for(trainer, fast=fast, rule=FirstOrder(head_steps=0), steps=2)
    assert fast_coverage(trainer.model).covered == plan.names
    assert fast_dropout(trainer.model) == plan.options["fast"] == "rank"
    trainer.train()


def test_all_the_parameters_on_half_of_the_sites_are_a_larger_rank(make_classifier):
    plan = weightlora.select_for(make_classifier(), adapters=0.5, rule="first_order")
    spent = weightlora.select_for(make_classifier("b"), adapters=0.5, parameters=1.0, rule="first_order")
    assert spent.names == plan.names
    assert min(r for r in spent.ranks.values() if r) > 4
    assert plan.expand("parameters").parameters <= spent.parameters <= spent.lora_parameters


def test_parameters_alone_read_no_batch_and_need_no_steps(make_classifier, tmp_path):
    """Rows that can be read once only are no matter, and neither is another number of steps."""

    class Once(IterableDataset):
        def __iter__(self):
            raise AssertionError("a row was read")

    trainer = make_classifier()
    trainer.train_dataset = Once()
    state = torch.get_rng_state()
    plan = weightlora.select_for(trainer, parameters=0.25)
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.rule == "uniform"
    assert {*plan.ranks.values()} == {1}  # of rank 4
    assert plan.parameters == sum(p.numel() for n, p in trainer.model.named_parameters() if ".lora_" in n)
    assert AdapterPlan.load(tmp_path / "run" / "plan.json") == plan
    with pytest.raises(OptionError, match="weightlora_plus has no option 'parameters'"):
        weightlora.method_for(make_classifier("plus"), "weightlora_plus", parameters=0.25)


def test_a_resumed_run_of_another_length_takes_the_stored_plan_under_the_default(
    make_classifier, tmp_path, monkeypatch
):
    plan = weightlora.select_for(make_classifier(max_steps=200))
    (tmp_path / "run" / "checkpoint-200").mkdir()
    assert plan.options["head_steps"] + plan.options["steps"] == 6  # 3 %
    assert len(plan.history) == plan.options["steps"]
    monkeypatch.setattr("weightlora.methods.families.selecting.selected", lambda *_, **__: pytest.fail("scored"))
    assert weightlora.select_for(make_classifier(max_steps=400)) == plan
    with pytest.raises(OptionError, match=r"steps=None there, 20 now"):
        weightlora.select_for(make_classifier(max_steps=400), rule="first_order")


def test_a_trainer_without_adapters_takes_a_config(make_classifier):
    trainer = make_classifier(lora=False)
    with pytest.raises(OptionError, match=r"no LoRA adapters.*get_peft_model"):
        weightlora.select_for(trainer, rule="first_order")
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    plan = weightlora.select_for(trainer, lora=config, adapters=2, rule="first_order")
    assert set(lora_layers(trainer.model)) == set(plan.names)
    assert len(plan.names) == 2
    trainer.train()


# -- one entry --------------------------------------------------------------------------------------------------------


def selected_by_hand(trainer, adapters):
    """``select()`` on the trainer's batches in groups of an optimizer step, each loss weighted as the Trainer does."""
    rows = trainer.args.per_device_train_batch_size
    accumulate = trainer.args.gradient_accumulation_steps
    count = min(24, len(trainer.train_dataset) // (rows * accumulate))
    torch.manual_seed(trainer.args.seed)
    order = iter(trainer.get_train_dataloader())
    groups = [
        [next(order) for _ in range(accumulate)]
        for _ in range(min(count, len(trainer.train_dataset) // (rows * accumulate)))
    ]

    def losses(model, group):
        for batch in group:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=trainer.args.bf16):
                loss = model(**batch).loss
            yield loss / len(group)

    rule = FirstOrder(head_steps=4)
    return weightlora.select(
        trainer.model,
        groups,
        adapters=adapters,
        rule=rule,
        steps=20,
        learning_rate=trainer.args.learning_rate,
        seed=trainer.args.seed,
        loss_fn=losses,
        progress=False,
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore::weightlora.errors.WeightLoraWarning")  # few batches are used again
def test_method_for_and_select_for_and_select_give_the_same_plan(make_classifier, accumulate, bf16):
    def trainer(folder, **changed):
        arguments = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2, "bf16": bf16}
        made = make_classifier(folder, **{**arguments, **changed})
        made.model_accepts_loss_kwargs = False  # a classifier's loss is a mean, which the Trainer then divides
        return made

    options = {"adapters": 3, "rule": FirstOrder(head_steps=4), "steps": 20}
    by_method = weightlora.method_for(trainer("a"), "selected", **options).plan
    by_line = weightlora.select_for(trainer("b"), **options)
    assert by_method == by_line
    by_hand = selected_by_hand(trainer("c"), 3)
    assert by_hand.history == by_line.history
    assert by_hand.ranks == by_line.ranks
    other = weightlora.select_for(trainer("d", seed=1), **options)
    assert other.history != by_line.history  # the control


# -- plans that are there already ------------------------------------------------------------------------------------


def test_a_second_start_takes_the_stored_plan(make_classifier, monkeypatch):
    plan = weightlora.select_for(make_classifier(), rule="first_order")
    monkeypatch.setattr("weightlora.methods.families.selecting.selected", lambda *_, **__: pytest.fail("scored"))
    trainer = make_classifier()
    assert weightlora.select_for(trainer, rule="first_order") == plan
    assert set(lora_layers(trainer.model)) == set(plan.names)
    with pytest.raises(pytest.fail.Exception, match="scored"):
        weightlora.select_for(make_classifier("elsewhere"), rule="first_order")  # negative control


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapters": 3}, "adapters=0.5 there, 3 now"),
        ({"rule": "paper"}, "rule='first_order' there, 'paper' now"),
        ({"seed": 9}, "seed=3 there, 9 now"),
        ({"learning_rate": 1.0}, "learning_rate=5e-05 there, 1.0 now"),
        ({"head_learning_rate": 1.0}, "head_learning_rate=5e-05 there, 1.0 now"),
        ({"steps": 7}, "steps=20 there, 7 now"),
        ({"ranking": "score"}, "ranking='spread' there, 'score' now"),
        ({"rule": "integrated", "warm_start": True}, "warm_start=False there, True now"),
    ],
)
def test_a_stored_plan_for_another_question_is_refused(make_classifier, tmp_path, options, text):
    weightlora.select_for(make_classifier(), rule="first_order")
    (tmp_path / "run" / "checkpoint-2").mkdir()
    with pytest.raises(OptionError, match=text):
        weightlora.select_for(make_classifier(), **{"rule": "first_order", **options})


def test_a_stored_plan_by_score_is_not_the_one_that_the_rule_spreads(make_classifier, tmp_path):
    weightlora.select_for(make_classifier(), rule="first_order", ranking="score")
    (tmp_path / "run" / "checkpoint-2").mkdir()
    with pytest.raises(OptionError, match="ranking='score' there, 'spread' now"):
        weightlora.select_for(make_classifier(), rule="first_order")


def trained_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_second_warm_start_begins_with_the_stored_weights(make_classifier, tmp_path, monkeypatch):
    trainer = make_classifier(learning_rate=2e-3)
    plan = weightlora.select_for(trainer, **WARM)
    assert plan.options["warm_start"] is True
    first = trained_weights(trainer)
    assert all(value.any() for name, value in first.items() if "lora_B" in name)
    trainer.train()  # changes the weights, and writes no checkpoint
    again = make_classifier(learning_rate=2e-3)
    with monkeypatch.context() as patched:
        patched.setattr("weightlora.methods.families.selecting.selected", lambda *_, **__: pytest.fail("scored"))
        assert weightlora.select_for(again, **WARM) == plan
    second = trained_weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], value) for name, value in trained_weights(trainer).items())
    cold = make_classifier("cold", learning_rate=2e-3)
    weightlora.select_for(cold, **{**WARM, "warm_start": False})
    assert not any(value.any() for name, value in trained_weights(cold).items() if "lora_B" in name)
    assert not (tmp_path / "cold" / "warm_start.safetensors").exists()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("damage", ["missing", "cut off", "another model's"])
def test_a_stored_warm_start_without_its_weights_is_refused(make_classifier, tmp_path, damage):
    weightlora.select_for(make_classifier(), **WARM)
    file = tmp_path / "run" / "warm_start.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file({"weight": torch.ones(2)}, str(file))
    trainer = make_classifier()
    with pytest.raises(OptionError, match=r"warm_start.safetensors.*(choose another output_dir, or delete)"):
        weightlora.select_for(trainer, **WARM)
    with pytest.raises(SelectionError, match="make a new trainer"):
        trainer.train()
    (tmp_path / "run" / "plan.json").unlink()  # as the text says
    weightlora.select_for(make_classifier(), **WARM)


def test_a_plan_alone_starts_afresh_and_says_so(make_classifier):
    plan = weightlora.select_for(make_classifier(), **WARM)
    trainer = make_classifier("elsewhere")
    with pytest.warns(WeightLoraWarning, match=r"warm_start=True.*initialised again"):
        adopt(trainer, plan, seed=3)
    assert not any(value.any() for name, value in trained_weights(trainer).items() if "lora_B" in name)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("options", [WARM, {"rule": "first_order"}], ids=["warm", "cold"])
def test_checkpoints_carry_the_plan_and_resume_bit_for_bit(make_classifier, tmp_path, options):
    def final(folder, resume, **arguments):
        trainer = make_classifier(folder, save_strategy="steps", save_steps=2, **{"max_steps": 6, **arguments})
        plan = weightlora.select_for(trainer, **options)
        trainer.train(resume_from_checkpoint=resume)
        return plan, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    plan, whole = final("whole", None)
    assert AdapterPlan.load(tmp_path / "whole" / "checkpoint-4" / "plan.json") == plan

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_):
            if state.global_step == 5:
                raise Killed

    trainer = make_classifier("parts", save_strategy="steps", save_steps=2, max_steps=6)
    weightlora.select_for(trainer, **options)
    trainer.add_callback(Kill())
    with pytest.raises(Killed):
        trainer.train()
    same_plan, parts = final("parts", True)
    assert same_plan == plan
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    _, shorter = final("shorter", None, max_steps=4)
    assert not all(torch.equal(shorter[name], whole[name]) for name in whole)  # negative control


# -- trainers that cannot be planned ---------------------------------------------------------------------------------


def test_a_trainer_that_has_trained_is_refused(make_classifier):
    trainer = make_classifier()
    trainer.train()
    with pytest.raises(OptionError, match="is not zero: it was trained"):
        weightlora.select_for(trainer, rule="first_order")


def test_a_trainer_with_an_optimizer_is_refused(make_classifier):
    trainer = make_classifier()
    trainer.create_optimizer()
    with pytest.raises(OptionError, match="has an optimizer"):
        weightlora.select_for(trainer, rule="first_order")


def test_a_wrapped_model_is_refused(make_classifier):
    trainer = make_classifier()
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    with pytest.raises(OptionError, match="wrapped already"):
        weightlora.select_for(trainer, rule="first_order")


def test_a_second_call_is_refused(make_classifier):
    trainer = make_classifier()
    weightlora.select_for(trainer, rule="first_order")
    with pytest.raises(OptionError, match="has a plan already"):
        weightlora.select_for(trainer, rule="first_order")


@pytest.mark.parametrize("init", ["pissa", "olora", False])
def test_an_initialisation_that_is_not_the_base_model_is_refused(make_classifier, init):
    trainer = make_classifier(lora=False)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=init, task_type="SEQ_CLS")
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, config)
    with pytest.raises(OptionError, match=r"B of .* is not zero"):
        weightlora.select_for(trainer, rule="first_order")


def test_pissa_works_on_the_base_model(make_classifier):
    trainer = make_classifier(lora=False)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa", task_type="SEQ_CLS")
    before = logits(trainer.model, first_batch(trainer))
    weightlora.select_for(trainer, lora=config, adapters=2, rule="first_order")
    assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(trainer.model).values())
    torch.testing.assert_close(logits(trainer.model, first_batch(trainer)), before, rtol=0, atol=1e-4)


def test_a_failed_selection_leaves_plain_lora_that_refuses_to_train(make_classifier, tmp_path):
    trainer = make_classifier()
    sites = set(lora_layers(trainer.model))
    with pytest.raises(OptionError, match=r"adapters=1\.5"):
        weightlora.select_for(trainer, adapters=1.5)
    assert set(lora_layers(trainer.model)) == sites
    assert not (tmp_path / "run" / "plan.json").exists()
    with pytest.raises(SelectionError, match="would train plain LoRA"):
        trainer.train()


def test_a_model_changed_after_the_plan_refuses_to_train(make_classifier):
    trainer = make_classifier()
    plan = weightlora.select_for(trainer, rule="first_order")
    layer = lora_layers(trainer.model)[plan.names[0]]
    layer.delete_adapter("default")
    with pytest.raises(weightlora.WeightLoraError, match="no adapter, planned rank"):
        trainer.train()
