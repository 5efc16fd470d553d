"""Prompt → completion: the harness's text, the loss on the answer alone, a measure that tells right from wrong."""

import logging
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from weightlora.errors import DataError, OptionError, WeightLoraWarning
from weightlora.tasks import load_model
from weightlora.tasks._answers import _after_end, _batches, find_tasks, generate
from weightlora.tasks._prompts import reasoning_rows, solves, template_options, to_prompts
from weightlora.tasks.base import RowOptions, Task
from weightlora.tasks.completion import TASKS, arguments_class, prepare
from weightlora.tasks.embedded import smollm2
from weightlora.tasks.rows import Source, load_rows

#: One row of each benchmark, in its schema; boolq's has the harness's ``label`` (of SuperGLUE) too.
ROWS = {
    "mathqa": {
        "Problem": "a train runs 60 km in 1.5 hours . how fast is it ?",
        "options": "a ) 40 km / h , b ) 30 km / h , c ) 4,5 km / h , d ) 90 km / h , e ) none of these",
        "correct": "a",
    },
    "gsm8k": {"question": "Tom has 3 nests of 4 eggs. How many?", "answer": "He has 3*4=<<3*4=12>>12 eggs.\n#### 12"},
    "hellaswag": {
        "activity_label": "Baking bread",
        "ctx_a": "[header] How to bake [title] Knead the dough.",
        "ctx_b": "the baker",
        "endings": ["eats a  stone.", "waits [step] for it to rise.", "sings.", "sleeps."],
        "label": "1",
    },
    "boolq": {"passage": "Snow is white.", "question": "is snow black", "answer": False, "label": 0},
    "arc_challenge": {
        "question": "Which is a metal?",
        "choices": {"text": ["wood", "iron", "wool"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
}
ANSWERS = {"mathqa": "40 km / h", "gsm8k": ROWS["gsm8k"]["answer"], "boolq": "no", "arc_challenge": "iron"}
ANSWERS["hellaswag"] = "waits for it to rise."
YAMLS = {
    **{name: f"{name}/{name}.yaml" for name in ("mathqa", "gsm8k", "hellaswag")},
    "boolq": "super_glue/boolq/default.yaml",
    "arc_challenge": "arc/arc_easy.yaml",
}
OWN = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in ((1, 2), (30, 4), (555, 6), (7, 7))]


#: An answer has an empty thought in front of it; where one is asked for, only if thinking is switched off.
NO_THOUGHT = "<think></think>\n"
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    f"{{% if message.role == 'assistant' %}}{NO_THOUGHT}{{% endif %}}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    f"{{% if enable_thinking is defined and not enable_thinking %}}{NO_THOUGHT}{{% endif %}}{{% endif %}}"
)


def task_of(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def splits(rows: list[dict]) -> DatasetDict:
    return DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows))


@pytest.fixture(scope="module")
def _smollm2_tokenizer():
    return AutoTokenizer.from_pretrained(str(smollm2().parent), gguf_file=smollm2().name)


@pytest.fixture(params=["plain", "chat", "thinking"])
def tokenizer(request, _smollm2_tokenizer):
    """SmolLM2's, which has a chat template; the same without; the same with one as Qwen3's."""
    found = deepcopy(_smollm2_tokenizer)
    if request.param == "plain":
        found.chat_template = None
    if request.param == "thinking":
        found.chat_template = THINKING
    return found


@pytest.fixture
def plain(_smollm2_tokenizer):
    found = deepcopy(_smollm2_tokenizer)
    found.chat_template = None
    return found


@pytest.fixture
def tiny(_smollm2_tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    # Weights large enough for the answer to depend on all of the prompt.
    sizes |= {"num_key_value_heads": 2, "initializer_range": 0.5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(_smollm2_tokenizer), **sizes))
    model.generation_config = GenerationConfig(eos_token_id=_smollm2_tokenizer.eos_token_id)
    return model


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        base = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
        return arguments_class()(**base, save_strategy="no", per_device_eval_batch_size=3, **options)

    return make


# -- text: ours is the harness's -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The harness's own tasks, reading our row instead of the hub's."""
    folder = tmp_path_factory.mktemp("harness")
    own = Path(lm_eval.tasks.__file__).parent
    for name, row in ROWS.items():
        Dataset.from_list([row]).to_json(folder / f"{name}.json")
        files = dict.fromkeys(("train", "validation", "test"), str(folder / f"{name}.json"))
        local = {"include": str(own / YAMLS[name]), "task": f"local_{name}", "dataset_path": "json", "tag": None}
        local |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local))
    _, tasks = find_tasks([f"local_{name}" for name in ROWS], folder)
    return dict(zip(ROWS, tasks, strict=True))


def requests_of(task, lm: HFLM) -> list[tuple[str, str]]:
    """What the harness asks a model of the task's only row, without worked examples."""
    chat = bool(lm.tokenizer.chat_template)
    task.build_all_requests(apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=lm.apply_chat_template)
    return [request.args for request in task.instances]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ROWS)
def test_the_trained_tokens_are_those_that_the_harness_scores(name, harness, tokenizer, tiny, arguments):
    task, judged = task_of(name), harness[name]
    judged.set_config("num_fewshot", 0)
    lm = HFLM(tiny, tokenizer=tokenizer, chat_template_args=template_options())
    prepared = prepare(task, splits([ROWS[name]]), tokenizer, RowOptions(max_length=256))
    (row,) = prepared.make_trainer(tiny, arguments(), []).train_dataset
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    completion = [label for label in row["labels"] if label != -100]
    document = next(iter(judged.eval_docs))
    if name == "gsm8k":
        ((context, _),) = requests_of(judged, lm)
        answer = document["answer"] if tokenizer.chat_template else f" {document['answer']}"
    else:
        right = judged.doc_to_target(document)
        context, answer = requests_of(judged, lm)[int(right)]
    assert answer.strip() == ANSWERS[name]
    asked, scored = lm._encode_pair(context, answer)
    tail = tokenizer("<|im_end|>\n" if tokenizer.chat_template else "<|im_end|>")["input_ids"]
    assert prompt + completion == asked + scored + tail
    # The harness counts blanks at the end of a context, here the template's line break, to each of the answers.
    assert prompt == asked + tokenizer("\n" if tokenizer.chat_template else "")["input_ids"]
    if tokenizer.chat_template == THINKING:  # negative control: the harness not told
        assert requests_of(judged, HFLM(tiny, tokenizer=tokenizer))[0][0] + NO_THOUGHT == requests_of(judged, lm)[0][0]


def test_a_row_that_is_none_of_the_task_is_one_line_that_shows_it():
    for name, wrong in {
        "mathqa": {"correct": "f"},
        "hellaswag": {"label": ""},  # as in its test split
        "arc_challenge": {"answerKey": "D"},
        "hellaswag ": {"ctx_b": None},
    }.items():
        name = name.strip()
        rows = Dataset.from_list([ROWS[name], {**ROWS[name], **wrong}])
        with pytest.raises(DataError, match=f"row 2 of the split 'test' is no row of {name} ") as caught:
            to_prompts(task_of(name), rows, "test", chat=False)
        assert "\n" not in str(caught.value)


# -- the user's own rows ---------------------------------------------------------------------------------------------


def test_own_texts_are_taken_as_they_are():
    rows = Dataset.from_list([{"q": "1+2=", "a": 3}])
    task = replace(task_of("completion"), columns={"prompt": "q", "completion": "a"})
    assert to_prompts(task, rows, "train", chat=False).to_list() == [{"prompt": "1+2=", "completion": "3"}]
    (made,) = to_prompts(task, rows, "train", chat=True)
    assert made["prompt"] == [{"role": "user", "content": "1+2="}]
    assert made["completion"] == [{"role": "assistant", "content": "3"}]


def test_the_last_assistant_message_is_the_completion():
    words = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in words]
    (made,) = to_prompts(task_of("chat"), Dataset.from_list([{"messages": messages}]), "train", chat=True)
    assert made["prompt"] == messages[:4]
    assert made["completion"] == messages[4:5]
    assert made["chat_template_kwargs"] == {"enable_thinking": False}
    messages[4]["content"] = "<think>5 and 6</think>" + messages[4]["content"]
    (made,) = to_prompts(task_of("chat"), Dataset.from_list([{"messages": messages}]), "train", chat=True)
    assert made["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("task", "row", "chat", "text"),
    [
        ("completion", {"prompt": "a", "completion": None}, False, "completion is None, which is no text"),
        ("completion", {"prompt": ["a"], "completion": "b"}, True, r"prompt is \['a'\], which is no text"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, True, "no assistant message answers"),
        ("chat", {"messages": [{"role": "assistant", "content": "a"}]}, True, "no assistant message answers"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, False, "no chat template"),
    ],
)
def test_what_is_no_prompt_and_completion_is_one_line(task, row, chat, text):
    with pytest.raises(DataError, match=text) as caught:
        to_prompts(task_of(task), Dataset.from_list([row]), "train", chat=chat)
    assert "\n" not in str(caught.value)


# -- puzzles ---------------------------------------------------------------------------------------------------------


def test_puzzles_are_distinct_and_those_to_measure_on_stay_the_same():
    rows = reasoning_rows("chain_sum", 30, 20, seed=0)
    questions = {split: rows[split]["prompt"] for split in rows}
    assert len(set(questions["train"])) == 30
    assert len(set(questions["validation"])) == 20
    assert set(questions["train"]) & set(questions["validation"]) == set()
    more = reasoning_rows("chain_sum", 60, 20, seed=0)
    assert more["validation"].to_list() == rows["validation"].to_list()
    assert more["train"].to_list()[:30] == rows["train"].to_list()
    # Row i of a generator comes from seed + i: neighbouring seeds would share 29 of 30 rows.
    assert len(set(reasoning_rows("chain_sum", 30, 20, seed=1)["train"]["prompt"]) & set(questions["train"])) < 5


def test_a_generator_has_its_own_settings_and_may_have_too_few_puzzles():
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    row = reasoning_rows("chain_sum", 1, 1, seed=0, **digits)["train"][0]
    left, operator, right = row["prompt"].split(": ")[1].removesuffix(" =").split()  # the question ends with "4 + 3 ="
    assert {left, right} <= set("0123456789")
    assert int(row["completion"]) == int(left) + int(right) * (1 if operator == "+" else -1)
    with pytest.raises(DataError, match=r"5000 draws of 'chain_sum' had \d+ new questions for train, not 500"):
        reasoning_rows("chain_sum", 500, 10, seed=0, **digits)


@pytest.mark.parametrize(
    ("generator", "settings", "error", "text"),
    [
        ("chain_sums", {}, OptionError, r"generator='chain_sums' is unknown \(closest: 'chain_sum'\)"),
        ("chain_sum", {"no_such": 1}, OptionError, "does not take .*no_such"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, OptionError, "does not take .*min_terms"),
        ("rush_hour", {}, DataError, "generator='rush_hour' gives no answers"),
    ],
)
def test_a_generator_that_cannot_be_trained_on_is_one_line(generator, settings, error, text):
    with pytest.raises(error, match=text) as caught:
        reasoning_rows(generator, 2, 2, seed=0, **settings)
    assert "\n" not in str(caught.value)


def test_a_recipe_names_the_settings_of_its_generator():
    named = {"dataset_config_name": "min_terms=2 max_terms=2", "max_train_samples": 9, "max_eval_samples": 3}
    rows = load_rows(task_of("reasoning"), Source(dataset_name="reasoning_gym/chain_sum", **named))
    same = reasoning_rows("chain_sum", 9, 3, seed=0, min_terms=2, max_terms=2)
    assert {name: split.to_list() for name, split in rows.items()} == {k: v.to_list() for k, v in same.items()}
    with pytest.raises(OptionError, match=r"dataset_config_name='two' is not allowed: .*, such as max_terms=3"):
        load_rows(task_of("reasoning"), Source(dataset_name="reasoning_gym/chain_sum", dataset_config_name="two"))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "generator",
    ["chain_sum", "arc_agi", "prime_factorization"],  # arc_agi compares tuples, prime_factorization raises on words
)
def test_an_answer_solves_its_own_puzzle_and_no_other_does(generator):
    row = reasoning_rows(generator, 1, 1, seed=0)["train"][0]
    assert solves(row["completion"], row["entry"])
    for wrong in ("", "no idea", row["completion"] + "1"):
        assert not solves(wrong, row["entry"])


# -- training --------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_completion_and_its_end_alone(tokenizer, tiny, arguments):
    prepared = prepare(task_of("completion"), splits(OWN), tokenizer, RowOptions())
    trainer = prepared.make_trainer(tiny, arguments(per_device_train_batch_size=4), [])
    batch = next(iter(trainer.get_train_dataloader()))
    found = {}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        kept = labels != -100
        assert ids[kept].tolist() == labels[kept].tolist()
        first = kept.nonzero()[0].item()
        found[tokenizer.decode(ids[:first])] = tokenizer.decode(labels[kept])
    if tokenizer.chat_template is None:
        assert found == {row["prompt"]: f"{row['completion']}<|im_end|>" for row in OWN}
    else:
        chats = [tokenizer.apply_chat_template(to_chat(row["prompt"]), **UNANSWERED) for row in OWN]
        answers = [f"{row['completion']}<|im_end|>\n" for row in OWN]
        assert found == dict(zip(chats, answers, strict=True))


UNANSWERED = {"tokenize": False, "add_generation_prompt": True, **template_options()}


def to_chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_options_decide_what_the_arguments_leave_open(plain, tiny, arguments):
    prepared = prepare(task_of("completion"), splits(OWN), plain, RowOptions(max_length=77))
    args = prepared.make_trainer(tiny, arguments(), []).args
    assert (args.max_length, args.completion_only_loss) == (77, True)
    args = prepared.make_trainer(tiny, arguments(max_length=99, completion_only_loss=False), []).args
    assert (args.max_length, args.completion_only_loss) == (99, False)


def test_rows_that_do_not_fit_are_named(plain, tiny, arguments):
    # In SmolLM2's tokens each digit and sign is one: "1+2=" is 4 long, "555+6=" 6, and then come the sum and the end.
    def make_trainer(most, **given):
        rows = DatasetDict(train=Dataset.from_list(OWN))
        prepared = prepare(task_of("completion"), rows, plain, RowOptions(max_length=most))
        return prepared.make_trainer(tiny, arguments(**given), [])

    with pytest.raises(DataError, match="fill max_length=3; raise max_length"):
        make_trainer(4, max_length=3)  # TRL's option, where the user set it
    with pytest.raises(DataError, match="fill max_seq_length=4; raise max_seq_length"):
        make_trainer(4)
    with pytest.warns(
        WeightLoraWarning, match=r"of 4 rows of the split 'train', max_seq_length=6 drops 1 .*cuts up to 3"
    ):
        assert len(make_trainer(6).train_dataset) == 3
    assert len(make_trainer(11).train_dataset) == 4  # 6 + 3 + 1 = 10: nothing is cut, and nothing is said


def test_of_plain_text_every_token_is_learnt_and_its_loss_is_measured(plain, tiny, arguments):
    rows = splits([{"words": f"{a} and {a + 1}"} for a in range(4)])
    prepared = prepare(replace(task_of("language_modelling"), columns={"text": "words"}), rows, plain, RowOptions())
    trainer = prepared.make_trainer(tiny, arguments(learning_rate=2e-2, per_device_train_batch_size=4), [])
    batch = next(iter(trainer.get_train_dataloader()))
    texts = {
        plain.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert texts == {f"{row['words']}<|im_end|>" for row in rows["train"]}
    assert torch.equal(batch["labels"], batch["input_ids"].where(batch["attention_mask"] == 1, -100))

    before = prepared.measure(trainer)
    assert before["validation_perplexity"] == pytest.approx(math.exp(before["validation_loss"]))
    with torch.no_grad():  # all rows have as many tokens, so the mean over batches is that over tokens
        loss = tiny(**batch).loss.item()
    assert before["validation_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.train()
    assert prepared.measure(trainer)["validation_loss"] < before["validation_loss"]


def test_without_rows_to_measure_there_is_a_trainer_and_no_number(plain, tiny, arguments):
    for task, row in (("language_modelling", {"text": "a b"}), ("completion", OWN[0])):
        rows = DatasetDict(train=Dataset.from_list([row]))
        prepared = prepare(task_of(task), rows, plain, RowOptions())
        assert prepared.measure(prepared.make_trainer(tiny, arguments(eval_strategy="no"), [])) == {}


@pytest.mark.parametrize("text", ["", None, ["a"]])
def test_a_row_without_text_is_one_line(plain, text):
    rows = DatasetDict(train=Dataset.from_list([{"text": text}]))
    with pytest.raises(DataError, match="row 1 of the split 'train' has no text"):
        prepare(task_of("language_modelling"), rows, plain, RowOptions())


@pytest.mark.sampled(1)
def test_two_steps_of_lora_and_every_metric(tokenizer, tiny, arguments):
    model = get_peft_model(tiny, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for task in (task_of("completion"), task_of("reasoning")):
        rows = splits(OWN) if task.name == "completion" else reasoning_rows("chain_sum", 4, 4, seed=0)
        prepared = prepare(task, rows, tokenizer, RowOptions(max_target_length=4))
        trainer = prepared.make_trainer(model, arguments(), [])
        assert trainer.model is model
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        measured = prepared.measure(trainer)
        assert set(measured) == {f"validation_{metric}" for metric in task.metrics}
        assert all(0 <= value <= 1 for value in measured.values())


@pytest.mark.sampled(1)
def test_what_is_learnt_by_heart_is_answered(tokenizer, tiny, arguments):
    prepared = prepare(task_of("completion"), splits(OWN[:2]), tokenizer, RowOptions(max_target_length=6))
    options = {"learning_rate": 2e-2, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    trainer = prepared.make_trainer(tiny, arguments(**options), [])
    assert prepared.measure(trainer) == {"validation_exact_match": 0.0}
    trainer.args.max_steps = 15
    trainer.train()
    assert prepared.measure(trainer) == {"validation_exact_match": 1.0}


@pytest.mark.sampled(1)
def test_teacher_forced_numbers_are_those_of_greedy_answers_and_of_a_loss_row_by_row(tokenizer, tiny, arguments):
    rows = splits(OWN)
    generated, forced = (
        prepare(task_of("completion"), rows, tokenizer, RowOptions(max_target_length=6, teacher_forced=forced))
        for forced in (False, True)
    )
    options = {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    trainer = forced.make_trainer(tiny, arguments(**options), [])
    shares = []
    for steps in (1, 5, 8):
        trainer.args.max_steps = steps
        trainer.train()
        found = forced.measure(trainer)
        assert found["validation_exact_match"] == generated.measure(trainer)["validation_exact_match"]
        losses = []
        for row in trainer.eval_dataset:
            ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
            with torch.no_grad():
                said = tiny(ids).logits[0, :-1].log_softmax(-1)
            losses += (-said[mask, ids[0, 1:][mask]]).tolist()
        assert found["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)  # padding reorders sums
        shares.append(found["validation_exact_match"])
    assert len(set(shares)) > 1  # so that equal numbers say something


def test_the_end_token_is_judged_and_what_follows_is_not():
    """9 ends; the first of the second row belongs to its prompt."""
    tokens = torch.tensor([[5, 9, 7, 9], [9, 5, 5, 9]])
    answer = torch.tensor([[True] * 4, [False, True, True, True]])
    assert _after_end(tokens, answer, [9]).tolist() == [[False, False, True, True], [False] * 4]


def test_teacher_forced_needs_to_know_which_tokens_are_the_answer(plain, tiny, arguments):
    prepared = prepare(task_of("completion"), splits(OWN), plain, RowOptions(teacher_forced=True))
    trainer = prepared.make_trainer(tiny, arguments(packing=True, completion_only_loss=False), [])
    with pytest.raises(OptionError, match="leave both out"):
        prepared.measure(trainer)


# -- answers ---------------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """A model that looks the answer up by the prompt, or says the next one's where it is to be wrong."""

    device = torch.device("cpu")
    generation_config = GenerationConfig()

    def __init__(self, tokenizer, answers: dict[str, str]):
        super().__init__()
        self.tokenizer, self.answers, self.batches = tokenizer, answers, []

    def generate(self, input_ids, attention_mask, **_):
        assert not self.training
        assert attention_mask[:, -1].all(), "padding stands on the left"
        prompts = [self.tokenizer.decode(ids[kept == 1]) for ids, kept in zip(input_ids, attention_mask, strict=True)]
        self.batches.append(prompts)
        said = self.tokenizer([f" {self.answers[p]}\n{self.tokenizer.eos_token}" for p in prompts])
        tokens = self.tokenizer.pad({"input_ids": said["input_ids"]}, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, tokens["input_ids"]], dim=1)


@pytest.mark.parametrize("name", ["completion", "reasoning"])
def test_an_oracle_is_always_right_and_one_with_mixed_up_answers_never(name, tokenizer):
    rows = reasoning_rows("chain_sum", 1, 7, seed=0) if name == "reasoning" else splits(OWN)
    texts, sums = rows["validation"]["prompt"], rows["validation"]["completion"]
    assert len(set(sums)) == len(sums)  # so that no other row's answer is right
    asked = [tokenizer.apply_chat_template(to_chat(t), **UNANSWERED) if tokenizer.chat_template else t for t in texts]
    prepared = prepare(task_of(name), rows, tokenizer, RowOptions())
    for answers, share in ((sums, 1.0), ([*sums[1:], sums[0]], 0.0), ([sums[0]] * len(sums), 1 / len(sums))):
        oracle = Oracle(tokenizer, dict(zip(asked, answers, strict=True))).train()
        trainer = SimpleNamespace(model=oracle, args=SimpleNamespace(per_device_eval_batch_size=3))
        assert prepared.measure(trainer) == {"validation_exact_match": share}
        assert oracle.training
        assert sorted(map(len, oracle.batches)) == sorted({4: [3, 1], 7: [3, 3, 1]}[len(sums)])


def test_a_batch_of_prompts_is_answered_as_one_by_one(tokenizer, tiny):
    tiny.generation_config.do_sample = True  # as many instruct models say of themselves
    prompts = ["A short one", "one that is a good deal longer than the others are", "two words", "and a fourth"]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    together = generate(tiny, tokenizer, prompts, batch_size=3, max_new_tokens=5)
    alone = [generate(tiny, tokenizer, [prompt], batch_size=1, max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) == len(prompts)


def test_an_answer_ends_where_the_tokenizer_or_the_model_says(plain, tiny):
    ids = plain("Once")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            ids.append(tiny(torch.tensor([ids])).logits[0, -1].argmax().item())
    said = ids[1:]
    assert said[0] != said[1]

    def answer() -> list[str]:
        return generate(tiny, plain, [plain("Once")["input_ids"]], batch_size=1, max_new_tokens=8)

    assert answer() == [plain.decode(said)]
    for ends in (said[1], [1, said[1]]):
        tiny.generation_config.eos_token_id = ends
        assert answer() == [plain.decode(said[:2])]  # an end that is no special token is seen in the text
    tiny.generation_config.eos_token_id = None
    plain.eos_token = plain.convert_ids_to_tokens(said[1])
    assert answer() == [plain.decode(said[:2], skip_special_tokens=True)]


# -- the model -------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_and_no_random_number_is_used_up(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = load_model(tmp_path, task_of("gsm8k"), DatasetDict(), seed=1, dtype=torch.float64)
    assert torch.get_rng_state().equal(state)
    assert loaded.lm_head.weight.dtype == torch.float64
    assert loaded.lm_head.weight.float().equal(tiny.lm_head.weight)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(DataError, match=f"cannot load AutoModelForCausalLM from {tmp_path / 'none'}: ") as caught:
        load_model(tmp_path / "none", task_of("gsm8k"), DatasetDict(), seed=1)
    assert "\n" not in str(caught.value)


def test_an_adapter_on_the_output_head_is_refused_in_one_line(tokenizer, tiny, arguments):
    model = get_peft_model(tiny, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(OptionError, match="lm_head"):  # TRL's own refusal: its loss reads that layer's weight
        prepare(task_of("completion"), splits(OWN), tokenizer, RowOptions()).make_trainer(model, arguments(), [])


def test_answers_are_counted_in_rows(caplog, monkeypatch):
    monkeypatch.setattr("weightlora.selection.progress.EVERY", 0.0)
    caplog.set_level(logging.INFO, "weightlora")
    assert list(_batches(nn.Identity(), [3, 1, 2], 2)) == [[0, 2], [1]]
    assert caplog.messages == ["answers: 2 of 3", "answers: 3 of 3"]
