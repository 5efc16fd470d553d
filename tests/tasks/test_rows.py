"""The user's own rows: read with or without rows to measure on, and every fault in one line."""

import pytest

from weightlora.errors import DataError, MissingPackageError, OptionError, require_extra
from weightlora.tasks import TASKS, find_task, kind_of
from weightlora.tasks.base import HELD_OUT, RowOptions
from weightlora.tasks.classification import label_names, prepare
from weightlora.tasks.rows import Source, load_rows

TASK = find_task("text_classification")
ROWS = [("a good film", "yes"), ("a bad film", "no"), ("so so", "no")]


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    return str(path)


def test_training_rows_alone_need_no_file_to_measure_on(csv):
    with pytest.raises(OptionError, match="train_file needs a validation_file"):
        load_rows(TASK, Source(train_file=csv))
    rows = load_rows(TASK, Source(train_file=csv), measured=False)
    assert list(rows) == ["train"]
    names = [label_names(TASK, rows)[number] for number in rows["train"]["label"]]
    assert list(zip(rows["train"]["text"], names, strict=True)) == ROWS
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
