"""Files of ``weightlora bench``, changed at random: a table is printed, or one line says what is wrong.

`make fuzz` tries more of them than the suite does.
"""

import json
import math
import re
from collections import Counter
from copy import deepcopy

import pytest
import yaml
from fuzz import cases, generator, tell

from weightlora.bench._entries import names
from weightlora.bench.grid import read_grid
from weightlora.cli import main
from weightlora.errors import OptionError

BASE = {"max_train_samples": 16, "held_out_samples": 8, "max_seq_length": 12, "max_steps": 2, "use_cpu": True}
FILE = {
    "base": BASE,
    "tasks": {"rotten_tomatoes": {"max_eval_samples": 8}},
    "methods": {"lora": None, "random": None, "half": {"method": "random", "parameters": 0.5}},
    "limits": [{"adapters": 1}, {"parameters": 0.5}],
    "learning_rates": ["5e-4", 5e-3],
    "seeds": [0, 1],
    "tuning_seeds": [0],
    "timing_rounds": 1,
    "reference": "lora",
    "metric": "accuracy",
    "keep_adapters": False,
    "output_dir": "runs/out",
}
NAN, INF, MANY = float("nan"), float("inf"), 10**30
KINDS = [None, True, 0, -1, 1.5, NAN, INF, MANY, "x", "", [], [1], [None], [[1]], ["x", "x"], {}, {"a": 1}, {1: 2}]
#: Values that mean nothing, by the path of an entry: they must be refused, and the line must name the entry.
WRONG = {
    ("base",): [True, 1.5, "x", [1], ["x"], {1: 2}, {"": 1}, {"nonsense": 1}, {"max_step": 2}],
    ("base", "method"): ["lora", None],
    ("base", "seed"): [1],
    ("base", "adapters"): [5],
    ("base", "memory"): ["8GB"],
    ("base", "learning_rate"): [1e-3],
    ("base", "output_dir"): ["x"],
    ("base", "task"): ["rte"],
    ("base", "max_steps"): [0, -2, 1.5, "a", [1], [1, 2], {"a": 1}, NAN, True],
    ("base", "max_seq_length"): [0, [12], {"a": 1}, "x", MANY],
    ("tasks",): [None, 1, "x", [], {}, [None], [1], ["nonsense"], [["rte"]], {"nonsense": {}}, {"rte": 3}, {1: {}}],
    ("tasks", "rotten_tomatoes"): [1, "x", [1], {"nonsense": 1}, {1: 2}, {"task": "rte"}, {"adapters": 1}],
    ("methods",): [None, 1, "x", [], {}, [None], [1], ["nonsense"], ["lora", "lora"], {"lora": 3}, {1: None}],
    ("methods", "lora"): [
        1,
        "x",
        [1],
        {"nonsense": 1},
        {"adapters": 5},
        {"seed": 1},
        {"method": None},
        {"method": ["x"]},
    ],
    ("methods", "random"): [
        *({"adapters": k} for k in (None, True, [], [1], {}, 0, -1, 1.5, "a", "auto", NAN, INF)),
        *({"parameters": k} for k in (None, 0, 1.5, "300k", "8GB")),
        {"time": 0.6},
        {"memory": "8GB"},
        {"keep": 5},
    ],
    ("methods", "full"): [{"learning_rates": rates} for rates in (None, [], 1e-3, [-1], ["a"], [0.1, "1e-1"], {})],
    ("limits",): [
        *(
            None,
            True,
            [],
            [0],
            ["a"],
            {},
            {"adapters": 1},
            1.5,
            NAN,
            "",
            [None],
            [[1]],
            [{}],
            [{"a": 1}],
            [{"keep": 5}],
        ),
        *([{"adapters": k}] for k in (None, 0, -1, 1.5, "a", NAN, INF, [1], {})),
        *([{"time": 2}], [{"memory": 8}], [{"memory": "8"}], [{"adapters": 1}, {"time": 0.6}]),
        [{"parameters": 0.5}, {"parameters": "0.50"}],
    ],
    ("learning_rates",): [None, True, [], 1e-3, [-1], ["a"], [NAN], ["inf"], [0.1, "1e-1"], [[1]], [None], [MANY], {}],
    ("seeds",): [None, True, [], 1, ["x"], ["1"], [-1], [1.5], [True], [0, 0], [MANY], [None], [[1]], {"a": 1}, "12"],
    ("tuning_seeds",): [None, [], 1, ["x"], [-1], [0, 0], [MANY], {}, {0: 1}, "", "12"],
    ("timing_rounds",): [None, -3, -1, True, False, 1.5, NAN, INF, "x", "1", [1], MANY],
    ("rows",): [None, True, "lora", [], [1], ["nonsense"], ["lora", "lora"], ["random"], {"lora": None}, [None], [" "]],
    ("reference",): [None, "nonsense", "", 1, ["lora"], {}],
    ("metric",): [None, "nonsense", "", 1, ["accuracy"]],
    ("tuning_metric",): [None, "nonsense", "", 1, ["accuracy"]],
    ("keep_adapters",): [None, 0, 1, "yes", [], {}, NAN],
    ("output_dir",): [None, "", " ", 1, ["x"], {}, True],
    ("nonsense",): [1, None],
    ("learning_rate",): [1e-3],
    (1,): [2],
}
#: Values that each mean something.
RIGHT = {
    ("base", "max_steps"): [1, "3", -1],
    ("base", "task"): ["rotten_tomatoes"],
    ("tasks",): [["rotten_tomatoes", "sst2"], {"sst2": None}],
    ("methods", "random"): [{"adapters": 3}, {"parameters": "300_000"}, {"adapters": "0.5", "parameters": 0.1}],
    ("limits",): [[{"adapters": 3}], [{"adapters": 1}, {"adapters": 1.0}], [{"adapters": 0.5, "parameters": 1.0}]],
    ("learning_rates",): [[0], ["1e-3"], [1, 2.5e-4]],
    ("seeds",): [[7], [0, 4294967295]],
    ("tuning_seeds",): [[100, 101]],
    ("timing_rounds",): [0],
    ("rows",): [["lora"], ["half", "lora", "random, K = 1", "random, parameters 0.5"]],
    ("reference",): ["half"],
    ("metric",): ["loss"],
    ("tuning_metric",): ["loss"],
    ("methods", "full"): [{"learning_rates": [1e-5, "1e-4"]}],
    ("keep_adapters",): [True],
}


def changed(path, value):
    """The file with one entry changed."""
    content = deepcopy(FILE)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def told(folder, capsys, content):
    """The exit code, and what is said."""
    (folder / "b.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    code = main(["bench", "--table", "--config", str(folder / "b.yaml"), "--output_dir", str(folder / "out")])
    return code, capsys.readouterr().err


def one_line(said):
    return re.fullmatch(r"weightlora: error: [^\n]+\n", said) is not None


@pytest.mark.sampled(10)
@pytest.mark.parametrize("path", WRONG, ids=lambda path: ".".join(map(str, path)))
def test_nonsense_in_an_entry_is_one_line_that_names_it(path, tmp_path, capsys):
    for value in WRONG[path]:
        code, said = told(tmp_path, capsys, changed(path, value))
        assert code == 2, value
        assert one_line(said), (value, said)
        names = {str(path[-1]), str(path[0]), str(path[0]).rstrip("s"), *(value if isinstance(value, dict) else ())}
        assert any(str(name) and str(name) in said for name in names), (value, said)
        assert not (tmp_path / "out").exists(), value


@pytest.mark.slow
@pytest.mark.fuzz
def test_files_at_random_are_a_table_or_one_line(tmp_path, capsys):
    rng, count = generator(), cases(80, 1_000)
    outcomes = Counter()
    for _ in range(count):
        right, path = rng.random() < 0.4, rng.choice(list(RIGHT))
        content = (
            changed(path, rng.choice(RIGHT[path])) if right else changed(rng.choice(list(WRONG)), rng.choice(KINDS))
        )
        if rng.random() < 0.5:
            content.pop(rng.choice(list(content)))
        if rng.random() < 0.3:
            content[rng.choice(list(FILE))] = rng.choice(KINDS)
        code, said = told(tmp_path, capsys, content)
        assert (code == 0 and not said) or (code == 2 and one_line(said)), (content, said)
        outcomes[code] += 1
        if code == 0:
            assert_sensible(read_grid(tmp_path / "b.yaml"), content)
    assert outcomes[0]
    assert outcomes[2]
    tell(capsys, f"{count} files of bench: {outcomes[0]} are a table, {outcomes[2]} one line; 0 raw tracebacks")


def assert_sensible(grid, content):
    """What is run is what the file says, and nothing in it is ignored."""
    for row in grid.rows:
        own = names(content["methods"])[row.label.split(",")[0]]
        rates = [choice["learning_rate"] for choice in row.choices]
        assert [*map(float, own.get("learning_rates", content["learning_rates"]))] == rates
        assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
    assert [*grid.seeds] == content.get("seeds", [0])
    assert [*grid.tuning_seeds] == content.get("tuning_seeds", [grid.seeds[0]])
    assert grid.timing_rounds == content.get("timing_rounds", 5) >= 0
    assert grid.keep_adapters is content.get("keep_adapters", False)
    assert {row.task for row in grid.rows} == {*content.get("tasks", ["rotten_tomatoes"])}
    assert len({(row.label, row.task) for row in grid.rows}) == len(grid.rows)
    for row in grid.rows:
        assert (content.get("base") or {}).items() <= row.options.items()
        assert row.metric == content.get("metric", "accuracy")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: &a [*a]\n", "only numbers, texts, lists and mappings|Circular"),
        ("base: {model_revision: 2020-01-01}\n", "put texts in quotes"),
        ("base: {1: 2, a: 3}\n", "mappings are allowed|give options"),
        ('methods: {"\\ud800": {method: lora}}\n', "only numbers, texts"),
        ("seeds: !!set {1, 2}\n", "only numbers, texts|seeds"),
        ("seeds: [" + "9" * 5000 + "]\n", "cannot read"),
        ("a: " + "[" * 5000, "cannot read"),
    ],
)
def test_what_only_yaml_can_say_is_one_line(text, says, tmp_path, capsys):
    (tmp_path / "b.yaml").write_text(text)
    assert main(["bench", "--config", str(tmp_path / "b.yaml")]) == 2
    said = capsys.readouterr().err
    assert one_line(said), said
    assert re.search(says, said), said


def test_words_of_the_command_are_checked_too(tmp_path, capsys):
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(FILE))
    wrong = ("--workers=x", "--workers=1.5", "--seed=-1", "--seed=x", "--learning_rate=-1", "--learning_rate=nan")
    wrong += (
        "--adapters=a",
        "--parameters=0",
        "--method=lora",
        "--task=nonsense",
        "--nonsense=1",
        "--against",
        "--against=x",
    )
    for word in wrong:
        assert main(["bench", "--table", "--config", str(tmp_path / "b.yaml"), word]) == 2, word
        assert one_line(capsys.readouterr().err)
    for workers in (0, -1):
        assert main(["bench", "--config", str(tmp_path / "b.yaml"), f"--workers={workers}"]) == 2
        assert f"workers={workers} is not allowed" in capsys.readouterr().err
    for gpus in ("-1", "1.5", "nan", "inf"):
        assert main(["bench", "--config", str(tmp_path / "b.yaml"), "--ray", f"--gpus_per_run={gpus}"]) == 2
        assert f"gpus_per_run={gpus} is not allowed" in capsys.readouterr().err
    assert main(["bench", "--config", str(tmp_path / "b.yaml"), "--gpus_per_run=0.5"]) == 2
    assert one_line(said := capsys.readouterr().err)
    assert "add --ray" in said
    assert not (tmp_path / "out").exists()


def test_a_file_holds_several_benchmarks_by_name(tmp_path):
    """``FILE#NAME`` is the benchmark that a file of its own would be; a file whose name has a # is itself."""
    one = {"methods": ["lora"], "learning_rates": [1e-3]}
    own, both, odd = tmp_path / "own.yaml", tmp_path / "both.yaml", tmp_path / "odd.yaml#own"
    own.write_text(json.dumps(one))
    odd.write_text(json.dumps(one))
    both.write_text(json.dumps({"own": one, "other": {**one, "seeds": [3]}, "text": "no part"}))
    assert read_grid(f"{both}#own") == read_grid(own) == read_grid(odd, read_grid(own).output_dir)
    assert read_grid([own, f"{both}#other"]).seeds == (3,)
    assert read_grid(f"{both}#other").output_dir.name == "other"
    for part in ("owm", "text", ""):
        with pytest.raises(OptionError, match=rf"both.yaml has no part '{part}'.*; there are own, other"):
            read_grid(f"{both}#{part}")
