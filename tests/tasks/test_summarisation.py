"""Summarisation: ROUGE by hand, a model that knows the summaries, and whole runs with a small BART."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration

from weightlora.errors import DataError
from weightlora.tasks import find_task, kind_of, load_model
from weightlora.tasks.base import RowOptions
from weightlora.tasks.summarisation import TASK_TYPE, arguments_class, prepare, rouge

OPTIONS = RowOptions(max_length=24, max_target_length=16, num_beams=2)
XSUM = find_task("xsum")
ROWS = [
    {"document": "Rain fell all night over several northern valleys.", "summary": "Heavy storms flooded farms."},
    {"document": "Voters chose their mayor on Sunday.", "summary": "An election ended. Nobody complained."},
    {"document": "Two trains stopped near Lyon after engine trouble.", "summary": "Rail delays"},
    {
        "document": "Scientists counted penguins again.",
        "summary": "More birds live there than anyone had thought before.",
    },
]


def splits(*rows):
    return DatasetDict({"train": Dataset.from_list(list(rows)), "validation": Dataset.from_list(list(rows))})


def tiny_bart(tokenizer, kind=BartForConditionalGeneration):
    torch.manual_seed(0)
    return kind(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
            forced_eos_token_id=tokenizer.sep_token_id,
        )
    )


def arguments(folder, **changed):
    given = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 2}
    return arguments_class()(output_dir=str(folder), **(given | changed))


# -- ROUGE -----------------------------------------------------------------------------------------------------------


def test_rouge_by_hand():
    """Stemmed: the cat sat on the mat | a dog bark (9 words), and: a dog bark | the cat slept (6 words).

    Words in common: a, dog, bark, the, cat. Pairs: "a dog", "dog bark", "the cat" of 5 and 8. The longest common
    subsequence is "a dog bark"; sentence by sentence it is that and "the cat". F = 2 · common / (found + wanted).
    """
    scores = rouge(["A dog barks! The cat slept"], ["The cats sat on the mat. A dog barked."])
    wanted = {"rouge1": 2 * 5 / 15, "rouge2": 2 * 3 / 13, "rougeL": 2 * 3 / 15, "rougeLsum": 2 * 5 / 15}
    assert scores == pytest.approx(wanted)


def test_rouge_is_the_mean_over_rows():
    assert rouge(["red fox", "red fox"], ["red fox", "blue whale"]) == pytest.approx(
        dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.5)
    )


def test_lines_of_highlights_are_sentences_too():
    """CNN/DailyMail parts its highlights by new lines, with or without a full stop."""
    assert rouge(["b c. a d"], ["a d\nb c"])["rougeLsum"] == pytest.approx(1)
    assert rouge(["b c. a d"], ["a d b c"])["rougeL"] == pytest.approx(0.5)


def test_other_words_get_nothing():
    assert set(rouge(["Heavy storms"], ["Voters chose"]).values()) == {0}
    assert set(rouge([""], ["Voters chose"]).values()) == {0}


# -- a model that knows ----------------------------------------------------------------------------------------------


class Knows(BartForConditionalGeneration):
    """Says the summary that it is given as labels, whose padding is -100, and remembers how it was asked."""

    def generate(self, labels, **asked):
        self.asked = asked
        return labels


class Repeats(BartForConditionalGeneration):
    """Says the document, which shares no word with the summary."""

    def generate(self, input_ids, **_):
        return input_ids


def measured(kind, rows, tokenizer, folder, options=OPTIONS):
    prepared = prepare(XSUM, splits(*rows), tokenizer, options)
    trainer = prepared.make_trainer(tiny_bart(tokenizer, kind), arguments(folder), [])
    return prepared.measure(trainer), trainer.model


def test_a_model_that_knows_the_summaries_gets_all(tokenizer, tmp_path):
    numbers, model = measured(Knows, ROWS, tokenizer, tmp_path)
    assert numbers == pytest.approx({f"validation_{name}": 1.0 for name in XSUM.metrics})
    assert (model.asked["max_length"], model.asked["num_beams"]) == (16, 2)


def test_a_model_that_repeats_the_document_gets_nothing(tokenizer, tmp_path):
    numbers, _ = measured(Repeats, ROWS, tokenizer, tmp_path)
    assert set(numbers.values()) == {0}


def test_a_cut_off_summary_is_measured_against_the_whole(tokenizer, tmp_path):
    """Five tokens hold [CLS], three of the six words, [SEP]: P = 1, R = ½."""
    rows = [{"document": "x", "summary": "one two three four five six"}]
    numbers, _ = measured(Knows, rows, tokenizer, tmp_path, RowOptions(max_target_length=5))
    assert numbers["validation_rouge1"] == pytest.approx(2 / 3)


# -- tokens and runs -------------------------------------------------------------------------------------------------


def test_documents_and_summaries_are_cut_at_their_own_lengths(tokenizer, tmp_path):
    rows = splits({"document": "rain " * 50, "summary": "sun " * 50})
    trainer = prepare(XSUM, rows, tokenizer, OPTIONS).make_trainer(tiny_bart(tokenizer), arguments(tmp_path), [])
    (tokens,) = trainer.train_dataset
    assert tokens["input_ids"] == tokenizer("rain " * 22)["input_ids"]
    assert tokens["labels"] == tokenizer("sun " * 14)["input_ids"]


def test_padding_is_no_label(tokenizer, tmp_path):
    trainer = prepare(XSUM, splits(*ROWS), tokenizer, OPTIONS).make_trainer(
        tiny_bart(tokenizer), arguments(tmp_path, remove_unused_columns=False), []
    )
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[2]])
    short = len(trainer.train_dataset[2]["labels"])
    assert (batch["labels"][1, short:] == -100).all()
    assert (batch["labels"][1, :short] >= 0).all()
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("beams", [1, 2])
def test_train_and_measure(tokenizer, tmp_path, beams):
    options = RowOptions(max_length=24, max_target_length=6, num_beams=beams)
    prepared = kind_of(XSUM).prepare(XSUM, splits(*ROWS), tokenizer, options)
    model = get_peft_model(tiny_bart(tokenizer), LoraConfig(task_type=TASK_TYPE, target_modules=["q_proj"], r=2))
    trainer = prepared.make_trainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), [])
    assert trainer.train().global_step == 2
    numbers = prepared.measure(trainer)
    assert set(numbers) == {f"validation_{metric}" for metric in XSUM.metrics}
    assert all(0 <= number <= 1 for number in numbers.values())
    assert trainer.evaluate()["eval_loss"] > 0


def test_every_evaluation_split_is_measured(tokenizer, tmp_path):
    rows = splits(*ROWS)
    rows["other"] = rows["validation"].select([2])
    prepared = prepare(XSUM, rows, tokenizer, OPTIONS)
    trainer = prepared.make_trainer(tiny_bart(tokenizer, Knows), arguments(tmp_path), [])
    numbers = prepared.measure(trainer)
    assert set(numbers) == {f"{split}_{name}" for split in ("validation", "other") for name in XSUM.metrics}


def test_load_model(tokenizer, tmp_path):
    tiny_bart(tokenizer).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = load_model(tmp_path, XSUM, DatasetDict(), seed=0, dtype=torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert model.dtype == torch.bfloat16


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"cannot load AutoModel.* from .*nowhere") as caught:
        load_model(tmp_path / "nowhere", XSUM, DatasetDict(), seed=0)
    assert "\n" not in str(caught.value)
