"""lm-evaluation-harness on a local task: its accuracy is the one computed by hand from the model's own logits."""

import random

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import of_bytes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weightlora.errors import DataError
from weightlora.tasks._answers import _scores, find_tasks, judge_model
from weightlora.tasks._prompts import template_options
from weightlora.tasks.base import RowOptions, Task
from weightlora.tasks.completion import arguments_class, prepare

ROWS = [
    {"question": f"Which of these is {thing}?", "choices": choices, "gold": 0}
    for thing in ("red", "the largest", "an animal", "made of wood")
    for choices in (["a rose", "the moon", "a very old chair"], ["a dog", "blood", "an elephant"])
]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
LOCAL = {
    "task": "local_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture(params=["plain", "chat"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """Of bytes, so that it is made in no time."""
    made = of_bytes(CHAT if request.param == "chat" else None)
    made.pad_token = made.bos_token = "<end>"
    return made


@pytest.fixture
def base(tokenizer, tmp_path):
    """The folder of a tiny random Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_key_value_heads=2, initializer_range=0.5)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter that changes what the model says."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def loaded(base, adapter):
    model = LlamaForCausalLM.from_pretrained(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def write_task(folder, rows, **fields):
    folder.mkdir(exist_ok=True)
    Dataset.from_list(rows).to_json(folder / "rows.json")
    local = {**LOCAL, "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}}, **fields}
    (folder / f"{local['task']}.yaml").write_text(yaml.safe_dump(local))
    return folder


def preferred(model, tokenizer, *, per_letter=False) -> list[int]:
    """The slow reference: the choice of the largest log-likelihood of each row, one forward pass a choice."""
    best = []
    for row in ROWS:
        context = f"Question: {row['question']}\nAnswer:"
        blank = " "
        if tokenizer.chat_template:
            context, blank = f"<user>{context}<assistant>", ""
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(context + blank + choice)["input_ids"]
            first = len(tokenizer(context)["input_ids"])
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(logs[i - 1, ids[i]].item() for i in range(first, len(ids)))
            sums.append(total / len(choice) if per_letter else total)
        best.append(sums.index(max(sums)))
    return best


def judge(base, adapter, tasks, *, include_path, limit=None, num_fewshot=0):
    """What the harness says of a saved adapter, which it loads itself."""
    given = {"peft": None if adapter is None else str(adapter), "device": "cpu", "batch_size": 8}
    lm = HFLM(str(base), **given, chat_template_args=template_options())
    return _scores(lm, find_tasks(tasks, include_path), limit=limit, num_fewshot=num_fewshot)


def share(first: list[int], second: list[int]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
def test_the_accuracy_is_the_one_by_hand(base, adapter, tokenizer, tmp_path):
    plain, adapted = (preferred(loaded(base, folder), tokenizer) for folder in (None, adapter))
    normed = preferred(loaded(base, adapter), tokenizer, per_letter=True)
    assert plain != adapted, "the adapter must make a difference here"
    # Gold is what the adapted model likes best, but for three rows on which the base model agrees with it. So the
    # adapted model has 5 of 8 right, and the base model fewer.
    agreed = [i for i in range(len(ROWS)) if plain[i] == adapted[i]][:3]
    gold = [(choice + (i in agreed)) % 3 for i, choice in enumerate(adapted)]
    assert share(plain, gold) < share(adapted, gold) == 5 / 8
    rows = [{**row, "gold": g} for row, g in zip(ROWS, gold, strict=True)]
    # The file's worked examples are left out, as they were in training; None brings them back.
    folder = write_task(tmp_path / "tasks", rows, num_fewshot=2, fewshot_split="test")

    found = judge(base, adapter, ["local_choice"], include_path=folder)
    assert found == {"local_choice_acc": 5 / 8, "local_choice_acc_norm": share(normed, gold)}
    assert judge(base, None, ["local_choice"], include_path=folder)["local_choice_acc"] == share(plain, gold)
    assert judge(base, adapter, ["local_choice"], include_path=folder, num_fewshot=None) != found
    assert judge(base, adapter, ["local_choice"], include_path=folder, limit=4)["local_choice_acc"] == share(
        adapted[:4], gold[:4]
    )


@pytest.mark.slow
def test_a_model_in_memory_is_judged_as_the_saved_one_and_left_as_it_was(base, adapter, tokenizer, tmp_path):
    folder = write_task(tmp_path / "tasks", ROWS)
    model = loaded(base, adapter).train()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = judge_model(model, tokenizer, ["local_choice"], include_path=folder, batch_size=3)
    assert torch.get_rng_state().equal(numbers[0])
    assert random.getstate() == numbers[1]
    assert np.random.get_state()[1].tolist() == numbers[2]
    assert model.training
    assert found == judge(base, adapter, ["local_choice"], include_path=folder)


@pytest.mark.slow
def test_a_task_of_the_harness_is_measured_by_it_after_training(base, tokenizer, tmp_path):
    """The same local task judges what SFTTrainer has trained; its rows have their own wording, the user's."""
    folder = write_task(tmp_path / "tasks", ROWS)
    rows = Dataset.from_list([{"prompt": row["question"], "completion": row["choices"][0]} for row in ROWS])
    columns = {"prompt": "prompt", "completion": "completion"}
    options = {"harness": "local_choice", "include_path": str(folder), "limit": 4}
    task = Task("mine", "completion", columns, ("acc", "acc_norm"), options=options)
    prepared = prepare(task, DatasetDict(train=rows, held_out=rows, validation=rows), tokenizer, RowOptions())
    named = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
    model = get_peft_model(loaded(base, None), LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer = prepared.make_trainer(model, arguments_class()(**named, save_strategy="no", learning_rate=0.1), [])
    trainer.train()
    model.save_pretrained(tmp_path / "trained")
    measured = prepared.measure(trainer)
    # The loss of rows held out, which a benchmark chooses by: that of the trained model in the words of the rows.
    trainer.model.eval()
    with torch.no_grad():
        batches = list(trainer.get_eval_dataloader(trainer.eval_dataset["held_out"]))
        losses = [trainer.model(**batch).loss.item() for batch in batches]
    assert measured.pop("held_out_loss") == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert set(measured) == {f"local_choice_{metric}" for metric in task.metrics}
    assert measured == judge(base, tmp_path / "trained", ["local_choice"], include_path=folder, limit=4)


def test_each_filter_of_a_generated_answer_has_a_name(base, tmp_path):
    filters = [
        {"name": "the-first", "filter": [{"function": "take_first"}]},
        {"name": "none", "filter": [{"function": "take_first"}]},
    ]
    fields = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[0]}}"}
    fields |= {"metric_list": [{"metric": "exact_match"}], "filter_list": filters, "num_fewshot": 0}
    fields["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 2}
    folder = write_task(tmp_path / "tasks", ROWS[:2], task="said", **fields)
    assert judge(base, None, ["said"], include_path=folder) == {
        "said_exact_match_the_first": 0.0,
        "said_exact_match": 0.0,
    }


# -- errors ----------------------------------------------------------------------------------------------------------


def test_the_users_task_takes_the_place_of_the_harness_s_of_that_name(tmp_path):
    folder = write_task(tmp_path / "tasks", ROWS, task="gsm8k")
    _, (task,) = find_tasks(["gsm8k"], folder)
    assert len(list(task.eval_docs)) == len(ROWS)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("what", ["no such task", "no such file", "no such folder"])
def test_a_task_that_is_not_there_is_one_line(what, tmp_path):
    missing = {"test": str(tmp_path / "nothing.json")}
    folder = write_task(tmp_path / "tasks", ROWS, dataset_kwargs={"data_files": missing})
    name, texts = "local_choice", ("cannot load the task 'local_choice'", "include_path")
    if what == "no such task":
        name, texts = "no_such_task", ("cannot load the task 'no_such_task'", "not a registered task", "include_path")
    elif what == "no such folder":
        folder, texts = tmp_path / "nothing", ("include_path=", "nothing")
    with pytest.raises(DataError) as caught:
        find_tasks([name], folder)
    assert all(text in str(caught.value) for text in texts)
    assert "\n" not in str(caught.value)
