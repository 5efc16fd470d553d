"""Data files of every format, changed at random: read as they are written, or refused in one line with file and row."""

import csv
import io
import json
import re
import tracemalloc
import warnings
from collections import Counter
from copy import deepcopy

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from fuzz import cases, generator, tell
from pyarrow import parquet

from weightlora.cli import main
from weightlora.errors import DataError, WeightLoraWarning
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import prepare
from weightlora.tasks import find_task, kind_of
from weightlora.tasks.base import HELD_OUT, RowOptions
from weightlora.tasks.classification import label_names
from weightlora.tasks.rows import Source, load_rows

CASES = cases(160, 500)
TASK = find_task("text_classification")
WORDS = [
    "plot",
    "10",
    "007",
    "null",
    "NA",
    "1e5",
    "True",
    'a "quote"',
    "a, comma",
    "two\nlines",
    "\u2028",
    "é",
    "ß",
    "{}",
]
FORMATS = ("csv", "json", "jsonl", "parquet")


def a_table(rng):
    """Rows of a text and a label, of at least two labels; texts that readers like to change are among them."""
    labels = rng.choice([["yes", "no"], ["1", "2", "10"], ["a", "b", "c d"]])
    count = rng.randint(len(labels), 9)
    drawn = [*labels, *(rng.choice(labels) for _ in range(count - len(labels)))]
    rng.shuffle(drawn)
    return [{"text": " ".join(rng.sample(WORDS, rng.randint(1, 3))), "label": label} for label in drawn]


def written(rows, form):
    """The bytes of a file of these rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if form == "parquet":
        sink = io.BytesIO()
        parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), sink)
        return sink.getvalue()
    if form == "csv":
        out = io.StringIO(newline="")
        lines = csv.DictWriter(out, names, lineterminator="\n", restval="")
        lines.writeheader()
        lines.writerows(rows)
        return out.getvalue().encode()
    objects = [json.dumps(row, ensure_ascii=False) for row in rows]
    return (f"[{', '.join(objects)}]" if form == "json" else "\n".join(objects)).encode()


# -- changes that alter nothing --------------------------------------------------------------------------------------


def other_columns(_, rows, form):
    return written([{"id": i, **dict(reversed(row.items()))} for i, row in enumerate(rows)], form)


def mark_and_line_ends(_, rows, form):
    if form == "parquet":
        return written(rows, form)
    return b"\xef\xbb\xbf" + (written(rows, form).replace(b"\n", b"\r\n") if form == "jsonl" else written(rows, form))


def blank_lines(_, rows, form):
    return written(rows, form) + (b"" if form == "parquet" else b"\n\n\r\n")


def spread_objects(_, rows, form):
    if form not in ("json", "jsonl"):
        return written(rows, form)
    return "\n".join(json.dumps(row, indent=1) for row in rows).encode()


HARMLESS = (other_columns, mark_and_line_ends, blank_lines, spread_objects)


# -- changes that no reader may let pass -----------------------------------------------------------------------------


def missing_label(rng, rows, form):
    empty = rng.choice(["", " ", "\u2028"] if form == "csv" else [None, "", "\t"])
    return written(replaced(rng, rows, label=empty), form)


def missing_text(rng, rows, form):
    if form == "csv":
        return missing_label(rng, rows, form)
    return written(replaced(rng, rows, text=None), form)


def blank_beside_label(rng, rows, form):
    added = replaced(
        rng, rows, label=rng.choice(["{} ", " {}", "{}\ufeff", "{}\u200b", "{}\n"]).format(rows[0]["label"])
    )
    return written([*rows, *added], form)


def one_label(_, rows, form):
    return written([{**row, "label": rows[0]["label"]} for row in rows], form)


def no_column(rng, rows, form):
    return written([{rng.choice(["Text", "sentence"]): row["text"], "label": row["label"]} for row in rows], form)


def no_rows(rng, _, form):
    return written([], form) if form != "csv" else rng.choice([b"", b"\n", b"text,label\n"])


def other_encoding(rng, rows, form):
    rows = replaced(rng, rows, text="café")
    return (
        written(rows, form).replace("é".encode(), b"\xe9") if form != "parquet" else b"\xff\xfe" + written(rows, form)
    )


def cut_off(rng, rows, form):
    whole = written(rows, form)
    if form == "csv":  # inside a quoted cell
        return whole + b'a film,"ye'
    return whole[: -rng.randint(1, 6)]


def uneven_lines(rng, rows, form):
    whole = written(rows, form)
    if form == "csv":
        return whole + rng.choice([b"a film\n", b"a film,yes,really\n", b"a film, yes, or no\n"])
    return {"json": b"[3]", "jsonl": whole + b'\n["a film", "yes"]', "parquet": b"PAR1" + whole[4:-4] + b"PAR2"}[form]


def strange_value(rng, rows, form):
    if form in ("csv", "parquet"):
        return missing_label(rng, rows, form)
    return written(rows, form).replace(b'"label"', rng.choice([b'"text": "", "label"', b'"label": [1], "label"']), 1)


def mixed_types(rng, rows, form):
    if form in ("csv", "parquet"):
        return one_label(rng, rows, form)
    return written([*rows, {"text": "a film", "label": rng.choice([3, 2.5, True, ["yes"], {"a": 1}, 10**40])}], form)


def replaced(rng, rows, **changed):
    place = rng.randrange(len(rows))
    return [{**row, **changed} if i == place else row for i, row in enumerate(rows)]


REFUSED = (missing_label, missing_text, blank_beside_label, one_label, no_column, no_rows, other_encoding, cut_off)
REFUSED += (uneven_lines, strange_value, mixed_types)


# -- changes at random: nothing is known but what must hold ----------------------------------------------------------


def random_bytes(rng, rows, form):
    data = bytearray(written(rows, form))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        piece = rng.choice([b"", b'"', b",", b"\n", b"\r", b"\x00", b"\xff", b"{", b"]", b"\\", b"null", b"1e999"])
        data[at : at + rng.randint(0, 3)] = piece
    return bytes(data)


def read(path, task=TASK):
    """The training rows as they are loaded, or the error; and what was said of them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return load_rows(task, Source(train_file=str(path)), measured=False), said
        except DataError as error:
            return error, said


def counted(outcomes):
    """The counts in a line."""
    texts = (f"{' '.join(key)}: {count}" for key, count in sorted(outcomes.items()))
    return f"{outcomes.total()} data files: {', '.join(texts)}; 0 raw tracebacks"


@pytest.mark.fuzz
def test_a_changed_file_is_read_as_it_is_written_or_refused_in_one_line(tmp_path, capsys):
    rng = generator()
    outcomes = Counter()
    for number in range(CASES):
        form, kind = FORMATS[number % 4], ("harmless", "refused", "refused", "random")[number // 4 % 4]
        change = rng.choice({"harmless": HARMLESS, "refused": REFUSED, "random": [random_bytes]}[kind])
        rows, path = a_table(rng), tmp_path / f"rows{number}.{form}"
        path.write_bytes(change(rng, rows, form))
        found, said = read(path)
        case = f"case {number}, {change.__name__}: {path.read_bytes()[:300]!r} gave {found!r}"
        if isinstance(found, DataError):
            assert kind != "harmless", case
            assert "\n" not in str(found), case
            assert str(path) in str(found), case
        else:
            assert kind != "refused", case
            names = label_names(TASK, found)
            found = [(row["text"], names[row["label"]]) for row in found["train"]]
            if kind == "harmless":
                assert found == [(row["text"], row["label"]) for row in rows], case
            assert all(isinstance(text, str) and label.strip() for text, label in found), case
            assert len({label for _, label in found}) > 1, case
            assert said or all(text.strip() for text, _ in found), case  # an empty text is not passed over in silence
        outcomes[form, kind, "refused" if isinstance(found, DataError) else "read"] += 1
    assert {(form, kind) for form, kind, _ in outcomes} == {
        (f, k) for f in FORMATS for k in ("harmless", "refused", "random")
    }
    tell(capsys, counted(outcomes))


#: A row of each of the user's own tasks.
OWN = {
    "text_classification": {"text": "a film", "label": "yes"},
    "pair_classification": {"text": "a film", "pair": "a plot", "label": 3},
    "regression": {"text": "a film", "label": 1.5},
    "summarisation": {"document": "a long plot", "summary": "a plot"},
    "completion": {"prompt": "1 + 1 =", "completion": "2"},
    "chat": {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]},
    "language_modelling": {"text": "once upon a time"},
    "question_answering": {
        "id": "q1",
        "question": "Where?",
        "context": "In Paris.",
        "answers": {"text": ["Paris"], "answer_start": [3]},
    },
}
ODD = [None, "", " ", 5, -1, True, 1e400, [], [None], [1], ["a"], {}, {"a": 1}, {"text": [], "answer_start": []}]
ODD += [{"text": [""], "answer_start": [0]}, {"text": ["Paris"], "answer_start": [None]}, [{"role": "user"}]]
ODD += [[{"role": "user", "content": None}, {"role": "assistant", "content": None}], [{"role": None, "content": "a"}]]


@pytest.mark.slow
@pytest.mark.fuzz
def test_what_the_reader_lets_pass_can_be_prepared(tmp_path, tokenizer, capsys):
    """An odd value in one of three rows, or in all; nothing but our own errors comes out of reader and tokenizer."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
    rng = generator()
    outcomes = Counter()
    for number in range(CASES // 2):
        task = find_task(list(OWN)[number % len(OWN)])
        rows = [deepcopy(OWN[task.name]) for _ in range(3)]
        if "label" in task.columns:
            rows[0]["label"] = rows[0]["label"] * 2
        role, odd = rng.choice(list(task.columns)), rng.choice(ODD)
        for row in rng.choice([rows, rows[2:]]):
            row[role] = odd
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(written(rows, "jsonl"))
        found, _ = read(path, task)
        if isinstance(found, DataError):
            assert re.fullmatch(rf".*{re.escape(str(path))}.*", str(found)), (task.name, rows)
        else:
            kind_of(task).prepare(task, found, tokenizer, RowOptions(max_length=32, doc_stride=4))
        outcomes[task.name, "refused" if isinstance(found, DataError) else "read"] += 1
    assert len({name for name, outcome in outcomes if outcome == "refused"}) == len(OWN)
    tell(capsys, counted(outcomes))


# -- single faults ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """Write a file of this name and text, and return its path."""

    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_cell_is_the_text_that_is_written_there(file):
    path = file("rows.csv", "\ufeffprompt,completion\n1 +\u2028 1,007\nNA,1e5\nnull,True\n")
    rows = load_rows(find_task("completion"), Source(train_file=path), measured=False)["train"]
    assert rows.to_list() == [
        {"prompt": "1 +\u2028 1", "completion": "007"},
        {"prompt": "NA", "completion": "1e5"},
        {"prompt": "null", "completion": "True"},
    ]


def test_labels_that_are_numbers_are_sorted_by_their_value(file):
    for name, text in {
        "rows.csv": "text,label\na,10\nb,9\nc,-1\n",
        "rows.jsonl": "".join(f'{{"text": "a", "label": {label}}}\n' for label in (10, 9, -1)),
    }.items():
        rows = load_rows(TASK, Source(train_file=file(name, text)), measured=False)
        assert label_names(TASK, rows) == ("-1", "9", "10")
        assert rows["train"]["label"][:] == [2, 1, 0]


def test_a_long_cell_and_many_lines(file):
    long = "word " * 40_000  # 200,000 characters; the csv module takes 131,072
    path = file("rows.csv", f'text,label\n"{long}",yes\n"two\nlines",no\nshort\n')
    with pytest.raises(DataError, match=r"^line 5 of .*rows.csv has 1 cell, but its header has 2"):
        load_rows(TASK, Source(train_file=path), measured=False)
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("limits", [{}, {"max_train_samples": 4}, {"held_out_samples": 1, "max_train_samples": 3}])
def test_the_head_knows_the_labels_of_all_splits(file, limits):
    train = file("train.csv", "text,label\n" + "a,no\nb,yes\n" * 3)
    validation = file("validation.csv", "text,label\na,maybe\nb,yes\n")
    source = Source(train_file=train, validation_file=validation, **limits)
    with pytest.warns(WeightLoraWarning, match="no training row has the label 'maybe', which the head knows"):
        rows = load_rows(TASK, source)
    assert {label_names(TASK, {"train": part}) for part in rows.values()} == {("maybe", "no", "yes")}
    assert rows["validation"]["label"][:] == [0, 2]
    assert (HELD_OUT in rows) == ("held_out_samples" in limits)
    with pytest.warns(WeightLoraWarning, match="'maybe'"):  # select has the head of train
        assert label_names(TASK, load_rows(TASK, source, measured=False)) == ("maybe", "no", "yes")


def test_a_label_like_a_missing_value_and_an_empty_text_are_said(file):
    path = file("rows.csv", "text,label\na,yes\n,no\nc,null\n")
    with pytest.warns(WeightLoraWarning) as said:
        load_rows(TASK, Source(train_file=path), measured=False)
    texts = [str(warning.message) for warning in said]
    assert any("1 of 3 rows have an empty 'text', such as line 3 of" in text for text in texts)
    assert any(
        "line 4 of" in text and "has the label 'null', which is taken as a label of its own" in text for text in texts
    )


def test_two_files_that_number_their_labels_differently_are_refused(tmp_path):
    files = []
    for names in (["no", "yes"], ["yes", "no"]):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        files.append(str(tmp_path / f"{names[0]}.parquet"))
        Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(files[-1])
    with pytest.raises(DataError, match=r"yes.parquet names its labels yes, no, the training rows have no, yes"):
        load_rows(TASK, Source(train_file=files[0], validation_file=files[1]))
    assert label_names(TASK, load_rows(TASK, Source(train_file=files[0], validation_file=files[0]))) == ("no", "yes")


def test_categories_of_pandas_are_labels(tmp_path):
    table = pa.table({"text": ["a", "b"], "label": pa.array(["no", "yes"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(TASK, Source(train_file=str(tmp_path / "rows.parquet")), measured=False)
    assert (label_names(TASK, rows), rows["train"]["label"][:]) == (("no", "yes"), [0, 1])


def test_a_correlation_of_one_row_is_refused_before_the_training(file):
    train, validation = file("train.csv", "text,label\na,1\nb,2\n"), file("validation.csv", "text,label\na,1\n")
    with pytest.raises(DataError, match="'validation' has one row; a correlation needs two"):
        load_rows(find_task("regression"), Source(train_file=train, validation_file=validation))


def long_rows(count):
    """Rows of 1,000 characters, ``count`` kB in all."""
    return [{"text": f"{i:04d}" + "é word " * 140, "label": "yes" if i % 3 else "no"} for i in range(count)]


def spoiled(data, form):
    """The file with a fault behind its middle, which no reader of the whole file may pass over."""
    if form == "csv":
        return data + b"one cell\n"
    if form == "parquet":
        third = len(data) // 3
        return data[:third] + bytes(third) + data[2 * third :]
    return data[:-1] + b"\xff"


@pytest.mark.parametrize("form", FORMATS)
def test_of_a_limited_file_only_the_first_rows_are_read(form, tmp_path):
    rows, path = long_rows(4000), tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, compression="none")
    else:
        path.write_bytes(written(rows, form))
    size = path.stat().st_size
    assert size > 4e6
    path.write_bytes(spoiled(path.read_bytes(), form))
    with pytest.raises(DataError, match=str(path)):  # negative control; it imports what a reader needs, too
        load_rows(TASK, Source(train_file=str(path)), measured=False)
    tracemalloc.start()
    found = load_rows(TASK, Source(train_file=str(path), max_train_samples=5), measured=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    names = label_names(TASK, found)
    assert [{**row, "label": names[row["label"]]} for row in found["train"]] == rows[:5]
    assert peak < size / 4  # text is read in pieces of at most 2^16 characters, of four bytes each at most


@pytest.mark.sampled(1)
@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_the_memory_of_a_whole_file_is_that_of_its_rows_in_arrow(form, tmp_path):
    rows, path = long_rows(16_000), tmp_path / f"rows.{form}"
    path.write_bytes(written(rows, form))
    load_rows(TASK, Source(train_file=str(path), max_train_samples=5), measured=False)  # imports
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    found = load_rows(TASK, Source(train_file=str(path)), measured=False)["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["text"][:] == [row["text"] for row in rows]
    # Python has at most two blocks of 1,000 of the 16,000 rows at a time.
    assert peak < path.stat().st_size / 2
    assert pa.total_allocated_bytes() - before < 2 * path.stat().st_size


def test_the_type_of_a_column_is_that_of_all_its_rows(file):
    """Also where the rows that decide it are thousands of rows behind the first."""
    values = [*range(1500), 0.5, *range(1500)]
    lines = [json.dumps({"text": "a", "label": value}) + "\n" for value in values]
    rows = load_rows(find_task("regression"), Source(train_file=file("rows.jsonl", "".join(lines))), measured=False)
    assert rows["train"].features["label"] == Value("float64")
    assert rows["train"]["label"][:] == values
    lines[2500] = '{"text": "a", "label": ["x"]}\n'
    path = file("rows.jsonl", "".join(lines))
    with pytest.raises(
        DataError, match=r"^line 2501 of .*rows.jsonl has \['x'\] as its 'label', which does not go with"
    ):
        load_rows(find_task("regression"), Source(train_file=path), measured=False)
    assert (
        len(
            load_rows(find_task("regression"), Source(train_file=path, max_train_samples=2500), measured=False)["train"]
        )
        == 2500
    )


def all_at_once(text):
    """Rows of JSON Lines and their lines, or the error, by Python's decoder on the whole text: the slow reference."""
    decoder, position, rows = json.JSONDecoder(), 0, []
    try:
        while position < len(text):
            value, end = decoder.raw_decode(text, position)
            rows.append((text.count("\n", 0, position) + 1, value))
            position = len(text) - len(text[end:].lstrip())
    except json.JSONDecodeError as error:
        return f"line {error.lineno} of {{}} is no JSON: {error.msg}, column {error.colno}"
    return rows


@pytest.mark.fuzz
def test_rows_are_the_same_wherever_a_piece_of_the_file_ends(tmp_path):
    """Pieces are of 65,536 characters; the values here are shorter and longer than that."""
    rng = generator()
    for number in range(max(12, CASES // 10)):
        rows = [
            {"text": rng.choice(WORDS) * rng.choice([1, 10, 5000, 30_000]), "label": rng.choice(["yes", "no"])}
            for _ in range(rng.randint(20, 60))
        ]
        objects = [json.dumps(row, ensure_ascii=False, indent=rng.choice([None, 1])) for row in rows]
        lines = "\n".join(objects)
        if number % 3 == 0:
            at = rng.randrange(len(lines))
            lines = lines[:at] + rng.choice(["", "{", "}", '"', "\\"]) + lines[at + 1 :]
        for form, text in (("jsonl", lines), ("json", f"[{', '.join(objects)}]")):
            path = tmp_path / f"rows{number}.{form}"
            path.write_text(text, encoding="utf-8", newline="")
            found, expected = read(path, find_task("language_modelling"))[0], all_at_once(lines)
            if form == "json":
                assert found["train"]["text"][:] == [row["text"] for row in rows]
            elif isinstance(expected, str):
                assert str(found) == expected.format(path)
            elif not isinstance(found, DataError):  # a changed row may lack its text
                assert found["train"]["text"][:] == [row["text"] for _, row in expected]


def test_faults_of_the_rows_are_found_before_a_model_is_loaded(file, tmp_path, capsys):
    path = file("rows.csv", "text,label\na,yes\nb\n")
    words = ["select", "--task=text_classification", f"--train_file={path}", "--model_name_or_path=/no/model"]
    assert main([*words, f"--output_dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"weightlora: error: line 3 of {path} has 1 cell")
    assert not (tmp_path / "run").exists()


def test_a_trainer_measures_labels_that_no_training_row_has(file, tmp_path):
    train, validation = file("train.csv", "text,label\na,no\nb,yes\n"), file("v.csv", "text,label\na,maybe\n")
    words = ["--task=text_classification", f"--train_file={train}", f"--validation_file={validation}", "--use_cpu"]
    recipe = read_recipe(words=[*words, "--report_to=none", f"--output_dir={tmp_path}", "--disable_tqdm=true"])
    with pytest.warns(WeightLoraWarning, match="'maybe'"):
        run = prepare(recipe)
    assert run.trainer.model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert run.task.measure(run.trainer)["validation_accuracy"] in (0.0, 1.0)
