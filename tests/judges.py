"""The benchmarks of Table 4 as lm-evaluation-harness reads them, with a row of ours instead of the hub's."""

from pathlib import Path

import lm_eval.tasks
import yaml
from datasets import Dataset

CHOICES = {"text": ["wood", "iron"], "label": ["A", "B"]}
#: A row of each benchmark of Table 4, and the file of lm-evaluation-harness that reads it.
JUDGED = {
    "mathqa": {"Problem": "1 + 1 ?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "b"},
    "gsm8k": {"question": "What is 1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    "hellaswag": {"activity_label": "Baking", "ctx_a": "Knead it.", "ctx_b": "the baker", "label": "1"}
    | {"endings": ["eats it.", "waits.", "sings.", "sleeps."]},
    "boolq": {"passage": "Snow is white.", "question": "is snow black", "answer": False, "label": 0},
    "arc_challenge": {"question": "Which is a metal?", "choices": CHOICES, "answerKey": "B"},
}
JUDGES = {name: f"{name}/{name}.yaml" for name in ("mathqa", "gsm8k", "hellaswag")}
JUDGES |= {"boolq": "super_glue/boolq/default.yaml", "arc_challenge": "arc/arc_easy.yaml"}


def write_judge(task, folder: Path) -> str:
    """The harness's own task file, reading our row instead of the hub's."""
    folder.mkdir()
    Dataset.from_list([JUDGED[task.name]]).to_json(folder / "row.json")
    files = dict.fromkeys(("train", "validation", "test"), str(folder / "row.json"))
    own = Path(lm_eval.tasks.__file__).parent / JUDGES[task.name]
    local = {"include": str(own), "task": task.name, "tag": None, "dataset_path": "json", "dataset_name": None}
    local |= {"dataset_kwargs": {"data_files": files}}
    if task.name == "gsm8k":  # its answers may have hundreds of tokens
        local |= {"generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 2}}
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(local))
    return str(folder)
