"""Result files of PEFT's own benchmark as a table, and a plan as one of its experiments."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig
from transformers import LlamaConfig

from weightlora import emit
from weightlora.cli import main
from weightlora.cost.empty_model import make_empty_model
from weightlora.errors import DataError
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.paper.tables import peft_table
from weightlora.plan.plan import AdapterPlan, PlannedSite
from weightlora.runs.recipe import read_recipe

#: The parts of a file of method_comparison/MetaMathQA/results that are read.
RESULT = {
    "run_info": {"experiment_name": "lora/rank32"},
    "train_info": {
        "status": "success",
        "num_trainable_params": 9175040,
        "train_time": 942.0,
        "accelerator_memory_max": 22292725760,
        "metrics": [{"step": 250}, {"test accuracy": 0.4784, "train loss": 0.6068, "forgetting": 0.05}],
    },
    "meta_info": {"system_info": {"accelerator": "NVIDIA L40S"}},
}


def written(folder, name="a", **train):
    path = folder / f"{name}.json"
    info = {**RESULT["train_info"], **train}
    path.write_text(json.dumps({**RESULT, "run_info": {"experiment_name": name}, "train_info": info}))
    return path


def test_the_numbers_are_those_of_the_files_and_the_best_comes_first(tmp_path, capsys):
    better = {"metrics": [{"test accuracy": 0.5, "train loss": 0.5}]}
    paths = [written(tmp_path), written(tmp_path, "b", **better)]
    rows = [[cell.text for cell in row] for row in peft_table(paths).rows]
    assert rows[1] == ["a", "9,175,040", "47.8", "0.607", "0.050", "15.7", "22.3", "NVIDIA L40S"]
    assert [row[0] for row in rows] == ["b", "a"]
    assert main(["paper", "peft", *map(str, paths)]) == 0
    assert "47.8" in capsys.readouterr().out


@pytest.mark.parametrize("train", [{"status": "failed"}, {"metrics": []}, {"metrics": 3}, {"train_time": "x"}])
def test_another_file_is_one_line(train, tmp_path):
    with pytest.raises(DataError) as error:
        peft_table([written(tmp_path, **train)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "3", "{}", "x"])
def test_what_is_no_result_is_one_line(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError):
        peft_table([tmp_path / "a.json"])
    assert main(["paper", "peft", str(tmp_path / "a.json")]) == 2
    assert main(["paper", "peft"]) == 2


def test_a_plan_is_an_experiment_folder_that_peft_reads(tmp_path):
    sites = [PlannedSite(Site(f"h.{i}.v_proj", 8, 8), 4, 8, r=4 * (i == 9), alpha=8, score=1.0) for i in range(10)]
    plan = AdapterPlan(tuple(sites), base_model="meta-llama/Llama-3.2-3B", lora={"task_type": "CAUSAL_LM"})
    folder = tmp_path / "experiments" / "lora" / "plan"
    folder.parent.mkdir(parents=True)
    emit(plan, "peft-benchmark", folder)
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, set(plan.names))
    training = json.loads((folder / "training_params.json").read_text())
    assert plan.learning_rate_factor == 2
    assert training == {
        "model_id": "meta-llama/Llama-3.2-3B",
        "optimizer_kwargs": {"lr": 2e-4, "weight_decay": 0.1},
    }
    shorter = replace(plan, options={"time": 0.6, "step_share": 0.6})
    emit(shorter, "peft-benchmark", folder.with_name("shorter"))
    assert json.loads((folder.with_name("shorter") / "training_params.json").read_text())["max_steps"] == 3000


RECIPES = Path(__file__).parents[2] / "recipes"


def rows_of_the_script():
    body = (RECIPES / "peft-benchmark.sh").read_text().split("<<ROWS\n")[1].split("ROWS\n")[0]
    return {name: options for name, *options in map(str.split, body.splitlines())}


def test_each_row_of_the_script_is_a_recipe():
    rows = rows_of_the_script()
    assert [*rows] == ["all-linear", "random", "default", "time", "upper-half"]
    for options in rows.values():
        recipe = read_recipe(RECIPES / "peft-benchmark.yaml", ["--use_cpu", "true", *options])
        assert recipe.model.model_name_or_path == "meta-llama/Llama-3.2-3B"


def test_its_rows_have_at_most_the_parameters_of_pefts_lora():
    """LoRA of rank 32 on q and v of 28 layers has 32·28·((3072 + 3072) + (3072 + 1024)) = 9,175,040."""
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 8}
    model = make_empty_model(LlamaConfig(**sizes, **heads), "CAUSAL_LM")
    budget = sum(adapter_parameters(find_sites(model, LoraConfig(r=32)).sites, LoraConfig(r=32)).values())
    few = LoraConfig(r=32, target_modules=["q_proj", "v_proj"])
    assert sum(adapter_parameters(find_sites(model, few).sites, few).values()) == 9_175_040 < budget
    for name, options in rows_of_the_script().items():
        given = dict(zip(options[::2], options[1::2], strict=True))
        if name == "upper-half":  # 14 of 28 equal blocks
            lora = LoraConfig(r=int(given["--lora_r"]))
            whole = sum(adapter_parameters(find_sites(model, lora).sites, lora).values())
            assert 0.99 * 9_175_040 < whole / 2 <= 9_175_040
        elif name != "default":
            assert given["--parameters"] == "9175040"
