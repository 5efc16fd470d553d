"""Result files of PEFT's own benchmark as a table, and a plan as one of its experiments."""

import json

import pytest
from peft import LoraConfig, PeftConfig

from weightlora import emit
from weightlora.cli import main
from weightlora.errors import DataError
from weightlora.model.sites import Site
from weightlora.paper.peft_results import peft_table
from weightlora.plan.plan import AdapterPlan, PlannedSite

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
