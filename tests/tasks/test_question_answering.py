"""Question answering: answers found back in their windows, and models that know or do not know them."""

import re
from collections import Counter
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CanineTokenizer, DebertaV2Config, DebertaV2ForQuestionAnswering, DebertaV2Model

from weightlora.errors import DataError, OptionError
from weightlora.tasks import find_task, kind_of, load_model
from weightlora.tasks._prompts import _passage, reasoning_rows
from weightlora.tasks.base import RowOptions
from weightlora.tasks.question_answering import TASK_TYPE, _windows, arguments_class, prepare
from weightlora.tasks.rows import Source, load_rows

OPTIONS = RowOptions(max_length=32, doc_stride=8)
FILLER = "Nobody knows why so many quiet rivers bend twice before they meet the grey northern sea, and few people ask. "
TOWER = "Gustave's firm built the Eiffel Tower in 1889, in Paris."
LONG = FILLER * 2 + "The lighthouse of Ar-Men was lit in August 1881 by Breton keepers. " + FILLER


def row(number, question, context, *golds):
    return {
        "id": f"q{number}",
        "question": question,
        "context": context,
        "answers": {"text": list(golds), "answer_start": [context.index(gold) for gold in golds]},
    }


ANSWERED = [
    row(0, "  What was built?", TOWER, "Eiffel Tower", "the Eiffel Tower"),
    row(1, "When was it lit?", LONG, "August 1881"),
    row(2, "Which lighthouse?", LONG, "Ar-Men", "lighthouse of Ar-Men"),
    row(3, "Where?", TOWER, "Paris"),
]
SILENT = [row(4, "Who lit the tower?", TOWER), row(5, "How deep is the sea?", LONG)]


def splits(*rows):
    return DatasetDict({"train": Dataset.from_list(list(rows)), "validation": Dataset.from_list(list(rows))})


# -- windows ---------------------------------------------------------------------------------------------------------


def spans_of(context, length):
    """A row for every run of ``length`` words."""
    words = list(re.finditer(r"\S+", context))
    for first, last in zip(words, words[length - 1 :], strict=False):
        begin, end = first.start(), last.end()
        answers = {"text": [context[begin:end]], "answer_start": [begin]}
        yield {"id": f"{begin}", "question": "Why so?", "context": context, "answers": answers}


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_lead_back_to_the_answer(tokenizer, side):
    """Answers of nine words are longer than what windows share, so that some are cut at either end."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = side
    rows = [*ANSWERED, *spans_of(LONG, 1), *spans_of(LONG, 9)]
    seen = Counter()
    for window in _windows(find_task("squad"), Dataset.from_list(rows), tokenizer, OPTIONS, extra=True):
        context, answers = (rows[window["row"]][key] for key in ("context", "answers"))
        gold, begin = answers["text"][0], answers["answer_start"][0]
        (left, _), *_, (_, right) = (offset for offset in window["offsets"] if offset)
        start, end = window["start_positions"], window["end_positions"]
        if left <= begin and begin + len(gold) <= right:
            first, last = window["offsets"][start], window["offsets"][end]
            assert (first[0], context[first[0] : last[1]]) == (begin, gold)
            seen["whole"] += 1
        else:
            assert start == end == window["cls"] == window["input_ids"].index(tokenizer.cls_token_id)
            seen["cut on the left"] += begin < left < begin + len(gold)
            seen["cut on the right"] += begin < right < begin + len(gold)
    assert seen["whole"] > len(rows) / 2
    assert min(seen.values()) > 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_hold_in_a_padded_batch(tokenizer, tmp_path, side):
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = side
    prepared = prepare(find_task("squad"), splits(*ANSWERED[::3]), tokenizer, OPTIONS)  # both fit a window
    trainer = prepared.make_trainer(OracleForQuestionAnswering(0), arguments(tmp_path), [])
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = [
        tokenizer.decode(ids[start : end + 1])
        for ids, start, end in zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True)
    ]
    assert (batch["attention_mask"] == 0).any()
    assert found == ["eiffel tower", "paris"]


def test_windows_cover_a_long_context_and_share_the_stride(tokenizer):
    windows = list(_windows(find_task("squad"), Dataset.from_list(ANSWERED[1:2]), tokenizer, OPTIONS, extra=True))
    pieces = [[tuple(offset) for offset in window["offsets"] if offset] for window in windows]
    assert len(pieces) > 3
    assert max(len(window["input_ids"]) for window in windows) == OPTIONS.max_length
    for before, after in pairwise(pieces):
        assert before[-OPTIONS.doc_stride :] == after[: OPTIONS.doc_stride]
    tokens = tokenizer(LONG, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert sorted(set().union(*pieces)) == tokens


def test_unanswerable_rows_point_at_cls(tokenizer):
    windows = list(_windows(find_task("squad_v2"), Dataset.from_list(SILENT), tokenizer, OPTIONS, extra=False))
    assert {(w["start_positions"], w["end_positions"]) for w in windows} == {(0, 0)}
    assert "offsets" not in windows[0]


# -- whole runs ------------------------------------------------------------------------------------------------------


class OracleForQuestionAnswering(nn.Module):
    """Its logits are 10 at the positions it is given, moved by ``shift``, and 0 elsewhere."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, input_ids, attention_mask, start_positions, end_positions):  # noqa: ARG002
        def logits(positions):
            return 10.0 * nn.functional.one_hot((positions + self.shift) % input_ids.shape[1], input_ids.shape[1])

        return {
            "loss": torch.zeros(()),
            "start_logits": logits(start_positions),
            "end_logits": logits(end_positions),
            "states": torch.zeros(len(input_ids), 3),  # what an encoder-decoder would add
        }


def arguments(folder, **changed):
    given = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 3}
    return arguments_class()(output_dir=str(folder), **(given | changed))


def measured(model, task, rows, tokenizer, folder):
    prepared = prepare(find_task(task), splits(*rows), tokenizer, OPTIONS)
    trainer = prepared.make_trainer(model, arguments(folder), [])
    return prepared.measure(trainer)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_that_knows_the_spans_gets_all(tokenizer, tmp_path, side):
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = side
    numbers = measured(OracleForQuestionAnswering(0), "squad", ANSWERED, tokenizer, tmp_path)
    assert numbers == {"validation_exact_match": 1, "validation_f1": 1, "validation_loss": 0}


def test_a_model_that_points_one_word_before_gets_nothing(tokenizer, tmp_path):
    numbers = measured(OracleForQuestionAnswering(-1), "squad", ANSWERED[1:2], tokenizer, tmp_path)
    assert numbers["validation_exact_match"] == 0
    assert numbers["validation_f1"] == pytest.approx(2 / 4)  # "in August" of "August 1881"


def test_a_model_that_knows_where_no_answer_is_gets_all(tokenizer, tmp_path):
    numbers = measured(OracleForQuestionAnswering(0), "squad_v2", ANSWERED + SILENT, tokenizer, tmp_path)
    assert numbers.pop("validation_best_threshold") == pytest.approx(-20)  # null score 0, spans 20
    assert numbers.pop("validation_loss") == 0  # the oracle's own
    assert set(numbers.values()) == {1}
    assert {"validation_exact_match", "validation_f1", "validation_best_exact_match", "validation_best_f1"} == {
        *numbers
    }


class SilentForQuestionAnswering(OracleForQuestionAnswering):
    """Points at [CLS] always."""

    def forward(self, input_ids, attention_mask, start_positions, end_positions):
        return super().forward(input_ids, attention_mask, 0 * start_positions, 0 * end_positions)


def test_silence_is_wrong_where_there_is_an_answer(tokenizer, tmp_path):
    """Two of the six questions have no answer."""
    numbers = measured(SilentForQuestionAnswering(0), "squad_v2", ANSWERED + SILENT, tokenizer, tmp_path)
    assert numbers["validation_exact_match"] == pytest.approx(2 / 6)


def tiny_config(tokenizer):
    return DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_train_and_measure(tokenizer, tmp_path, name):
    task = find_task(name)
    prepared = kind_of(task).prepare(task, splits(*ANSWERED), tokenizer, OPTIONS)
    base = DebertaV2ForQuestionAnswering(tiny_config(tokenizer))
    model = get_peft_model(base, LoraConfig(task_type=TASK_TYPE, target_modules=["query_proj"], r=2))
    trainer = prepared.make_trainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), [])
    assert trainer.train().global_step == 2
    numbers = prepared.measure(trainer)
    assert {f"validation_{metric}" for metric in task.metrics} <= numbers.keys()
    assert all(0 <= numbers[f"validation_{metric}"] <= 1 for metric in task.metrics)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_loss_is_the_mean_over_windows(tokenizer, tmp_path):
    prepared = prepare(find_task("squad"), splits(*ANSWERED), tokenizer, OPTIONS)
    model = DebertaV2ForQuestionAnswering(tiny_config(tokenizer)).eval()
    trainer = prepared.make_trainer(model, arguments(tmp_path, per_device_eval_batch_size=1), [])  # without padding
    with torch.no_grad():
        losses = [model(**{key: torch.tensor([row[key]]) for key in row}).loss.item() for row in trainer.eval_dataset]
    assert len(losses) > len(ANSWERED)  # long contexts have several windows
    assert prepared.measure(trainer)["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_every_evaluation_split_is_measured(tokenizer, tmp_path):
    rows = splits(*ANSWERED)
    rows["other"] = rows["validation"].select([3])
    prepared = prepare(find_task("squad"), rows, tokenizer, OPTIONS)
    trainer = prepared.make_trainer(OracleForQuestionAnswering(0), arguments(tmp_path), [])
    assert set(prepared.measure(trainer)) == {
        f"{split}_{metric}" for split in ("validation", "other") for metric in ("exact_match", "f1", "loss")
    }
    assert set(trainer.eval_dataset) == {"validation", "other"}


# -- generated passages ----------------------------------------------------------------------------------------------


def test_generated_passages_are_those_of_the_generator_with_the_answer_at_its_place():
    named = {"dataset_config_name": "min_num_statements=3 max_num_statements=5"}
    rows = load_rows(find_task("needle_haystack"), Source(max_train_samples=30, max_eval_samples=20, **named))
    puzzles = reasoning_rows("needle_haystack", 30, 20, seed=0, min_num_statements=3, max_num_statements=5)
    assert [len(rows[split]) for split in ("train", "validation")] == [30, 20]
    for split, some in rows.items():
        for row, puzzle in zip(some, puzzles[split], strict=True):
            assert f"{row['context']} \n{row['question']} Reply only with a name." == puzzle["prompt"]
            [name], [start] = row["answers"]["text"], row["answers"]["answer_start"]
            assert name == puzzle["completion"]
            assert f"{name} {row['question'][4:-1]}." in row["context"][start:].split(". ", 1)[0] + "."


def test_the_answer_is_the_whole_name_of_the_statement_that_was_asked_for():
    prompt = "JoAnn likes tea. Ann fears tea. Ann likes tea. \nWho likes tea? Reply only with a name."
    row = _passage({"prompt": prompt, "completion": "Ann"}, 7)
    assert row["answers"] == {"text": ["Ann"], "answer_start": [32]}
    assert row["context"][32:] == "Ann likes tea."
    assert row["id"] == "7"


def test_a_generator_without_passages_is_one_line():
    source = Source(dataset_name="reasoning_gym/chain_sum")
    with pytest.raises(OptionError, match=r"reasoning_gym/chain_sum is not read as contexts .* or take task=reasoning"):
        load_rows(find_task("question_answering"), source)


# -- what a user may get wrong ---------------------------------------------------------------------------------------


def test_the_fresh_head_depends_on_the_seed_alone(tokenizer, tmp_path):
    DebertaV2Model(tiny_config(tokenizer)).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    first, again, other = (
        load_model(tmp_path, find_task("squad"), DatasetDict(), seed=seed).qa_outputs.weight for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_load_model_passes_further_arguments_on(tokenizer, tmp_path):
    DebertaV2Model(tiny_config(tokenizer)).save_pretrained(tmp_path)
    model = load_model(tmp_path, find_task("squad"), DatasetDict(), seed=0, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"cannot load AutoModel.* from .*nowhere") as caught:
        load_model(tmp_path / "nowhere", find_task("squad"), DatasetDict(), seed=0)
    assert "\n" not in str(caught.value)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(OptionError, match="CanineTokenizer does not give the characters of a token"):
        prepare(find_task("squad"), splits(*ANSWERED), CanineTokenizer(), OPTIONS)


def test_a_stride_as_long_as_the_window_is_refused(tokenizer):
    with pytest.raises(
        OptionError, match=r"doc_stride=128 must be smaller than the 120 tokens that max_seq_length=128"
    ):
        prepare(find_task("squad"), splits(*ANSWERED), tokenizer, RowOptions(max_length=128, doc_stride=128))


def test_a_question_that_fills_the_window_is_refused(tokenizer):
    rows = splits(row(0, "why " * 25, TOWER, "Paris"))
    with pytest.raises(OptionError, match=r"the 4 tokens that max_seq_length=32 leaves after a question of 25"):
        prepare(find_task("squad"), rows, tokenizer, OPTIONS)


def test_a_question_without_an_answer_needs_the_task_for_it(tokenizer):
    with pytest.raises(DataError, match=r"row 5 of the split 'train' has no answer; .* task=squad_v2"):
        prepare(find_task("squad"), splits(*ANSWERED, *SILENT), tokenizer, OPTIONS)


def test_answers_that_stand_elsewhere_are_refused(tokenizer):
    moved = deepcopy(ANSWERED[3])
    moved["answers"]["answer_start"] = [3]
    with pytest.raises(DataError, match=r"1 of 2 answers in the split 'train' .* that of row 2 of "):
        prepare(find_task("squad"), splits(ANSWERED[0], moved), tokenizer, OPTIONS)


@pytest.mark.parametrize(
    "answers",
    ["Paris", {"text": ["Paris"]}, {"text": "Paris", "answer_start": 3}, {"text": ["Paris"], "answer_start": [1, 2]}],
)
def test_answers_of_another_form_are_refused(tokenizer, answers):
    with pytest.raises(DataError, match=r"row 1 of the split 'train' has the answers .*Paris"):
        prepare(find_task("squad"), splits({**ANSWERED[3], "answers": answers}), tokenizer, OPTIONS)
