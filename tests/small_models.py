"""Made in no time: a tiny random Llama and rows for it, a tokenizer of bytes, benchmarks of one row."""

from pathlib import Path

import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_rows(count=24, length=8):
    tokens = torch.randint(32, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def of_bytes(chat: str | None) -> PreTrainedTokenizerFast:
    """Like Llama's, without a token for padding; with a chat template, like Qwen's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": len(letters)}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>")
    made.chat_template = chat
    return made


# -- the benchmarks of Table 4, as lm-evaluation-harness reads them --------------------------------------------------

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
    import lm_eval.tasks  # loads much, which only these tests need

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
