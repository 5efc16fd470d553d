"""A store of hidden states changes no number: outputs, gradients and trainings are those of the whole model."""

import errno
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import weightlora
from weightlora.errors import DataError, OptionError, WeightLoraWarning
from weightlora.model import frozen_prefix as prefixes
from weightlora.model.frozen_prefix import FrozenPrefix, find_floor
from weightlora.model.hidden_store import HiddenFile, HiddenStore
from weightlora.selection.rules.base import Rule, Scores
from weightlora.trainer.store import StoreCallback, store_frozen

ROWS, LONG = 12, 9
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "pad_token_id": 0}
WIDE = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}
LLM = {**WIDE, "num_key_value_heads": 1, "head_dim": 8}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART = {"d_model": 16, "vocab_size": 32, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART |= {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 4), ("ffn_dim", 24))}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
SHORT = {**LLM, "sliding_window": 4}
#: PEFT takes no pattern where it renames the layers of a mixture.
UPPER = [f"model.layers.{i}.self_attn.{name}_proj" for i in (2, 3) for name in "qv"]
KINDS = ["full_attention", "sliding_attention"] * 2
#: Family → class, its configuration, and which layers carry adapters: those of the upper two of four blocks.
FAMILIES = {
    "BERT": ("BertForSequenceClassification", {**WIDE, **STILL}, r".*layer\.[23]\..*(query|value)"),
    "RoBERTa": ("RobertaForSequenceClassification", {**WIDE, **STILL}, r".*layer\.[23]\..*(query|value)"),
    "DeBERTa": ("DebertaV2ForSequenceClassification", {**WIDE, **STILL}, r".*layer\.[23]\..*(query|value)_proj"),
    "ModernBERT": ("ModernBertForSequenceClassification", {**WIDE, "cls_token_id": 1}, r".*layers\.[23]\..*Wqkv"),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0}
        | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        r".*h\.[23]\.attn\.c_attn",
    ),
    "Llama": ("LlamaForCausalLM", LLM, r".*layers\.[23]\..*(q|v)_proj"),
    "Qwen2": ("Qwen2ForCausalLM", LLM, r".*layers\.[23]\..*(q|v)_proj"),
    "Qwen3": ("Qwen3ForCausalLM", LLM, r".*layers\.[23]\..*(q|v)_proj"),
    "Gemma 2": ("Gemma2ForCausalLM", {**SHORT, "layer_types": KINDS}, r".*layers\.[23]\..*(q|v)_proj"),
    "Gemma 3": ("Gemma3ForCausalLM", {**SHORT, "layer_types": KINDS}, r".*layers\.[23]\..*(q|v)_proj"),
    "Mistral": ("MistralForCausalLM", SHORT, r".*layers\.[23]\..*(q|v)_proj"),
    "Phi": ("PhiForCausalLM", {**WIDE}, r".*layers\.[23]\..*(q|v)_proj"),
    "Mixtral": ("MixtralForCausalLM", {**LLM, "num_local_experts": 4}, UPPER),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        {**LLM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        UPPER,
    ),
    "BART": ("BartForConditionalGeneration", BART, r".*(encoder\.layers\.[23]\..*q_proj|decoder\..*v_proj)"),
    "ViT": (
        "ViTForImageClassification",
        {**STILL, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
        | {"image_size": 8, "patch_size": 4},
        r".*layers\.[23]\..*(q|v)_proj",
    ),
}


def model_of(family):
    name, fields, targets = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    base = kind(kind.config_class(**fields))
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def rows_of_family(family, count=ROWS):
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        pictures = torch.randn(count, 3, 8, 8, generator=generator)
        return [{"pixel_values": picture, "labels": i % 2} for i, picture in enumerate(pictures)]
    sentences = "SequenceClassification" in FAMILIES[family][0]
    rows = []
    for i in range(count):
        ids = torch.randint(3, 32, (3 + i % (LONG - 3),), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2 if sentences else ids})
    return rows


def padded(rows):
    """The rows as a batch, padded to the longest."""
    if "pixel_values" in rows[0]:
        return {
            "pixel_values": torch.stack([r["pixel_values"] for r in rows]),
            "labels": torch.tensor([r["labels"] for r in rows]),
        }
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor(
            [r[key] if isinstance(r[key], int) else r[key] + [fill[key]] * (width - len(r[key])) for r in rows]
        )
        for key in rows[0]
    }


def trainer_of(folder, family, model=None, rows=None, **arguments):
    given = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    given |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return Trainer(
        model_of(family) if model is None else model,
        TrainingArguments(str(folder), **{**given, **arguments}),
        train_dataset=rows_of_family(family) if rows is None else rows,
        data_collator=padded,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_model(family, tmp_path):
    """In other batches with other padding than those that filled the store."""
    trainer = trainer_of(tmp_path, family)
    model, rows = trainer.model, rows_of_family(family)
    batches = [padded([rows[i] for i in some]) for some in ([0, 5, 1, 7], [3, 2, 8, 4], [11, 6, 10, 9])]
    others = [padded([rows[i] for i in some]) for some in ([7, 11, 0, 2], [1, 4, 9, 3], [8, 5, 6, 10])]

    def found(batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    whole = [found(batch) for batch in others]
    store = store_frozen(trainer)
    ran = []
    lowest = find_floor(model).blocks[0]
    lowest.register_forward_hook(lambda *_: ran.append(1))
    model.train()
    for batch in batches:
        found(batch)
    filled = len(ran)
    assert (store.rows, store.misses, filled) == (ROWS, ROWS, 3)
    for batch, (loss, gradients) in zip(others, whole, strict=True):
        stored, theirs = found(batch)
        assert stored == pytest.approx(loss, rel=1e-4)
        assert gradients.keys() == theirs.keys()
        for name, gradient in gradients.items():
            assert theirs[name].allclose(gradient, rtol=1e-3, atol=1e-5), name
    assert (store.hits, len(ran)) == (ROWS, filled), "the lowest block does not run again"
    model.eval()
    with torch.no_grad():
        model(**others[0])
    assert len(ran) == filled + 1, "evaluation runs the whole model"
    store.remove()
    assert find_floor(model).blocks[0] is lowest
    assert not any(isinstance(m, nn.Module) and type(m).__name__ == "_Stored" for m in model.modules())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ["BERT", "Llama", "Gemma 3"])
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_training_ends_with_the_same_adapter(family, where, tmp_path):
    plain = trainer_of(tmp_path / "plain", family)
    plain.train()
    trainer = trainer_of(tmp_path / "run", family)
    keys = set(trainer.model.state_dict())
    store = weightlora.store_frozen(trainer, folder=None if where == "memory" else tmp_path / "states")
    trainer.train()
    assert (store.rows, store.hits, store.misses) == (ROWS, 2 * ROWS, ROWS)
    assert set(trainer.model.state_dict()) == keys
    mine, theirs = (dict(t.model.named_parameters()) for t in (trainer, plain))
    moved = model_of(family).state_dict()
    for name, value in theirs.items():
        assert mine[name].allclose(value, rtol=1e-3, atol=1e-4), name
        if value.requires_grad and "lora_B" in name:
            assert not value.equal(moved[name])
    if where == "folder":  # a second training of the same model computes nothing below the floor
        again = trainer_of(tmp_path / "again", family)
        read = store_frozen(again, folder=tmp_path / "states")
        again.train()
        assert (read.hits, read.misses) == (3 * ROWS, 0)
        for name, value in again.model.named_parameters():
            assert mine[name].allclose(value, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer"])
def test_trl_trains_the_same_adapter(kind, tmp_path, tokenizer):
    """DPO's loss runs the model without adapters, too, for its reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer.pad_token, tokenizer.eos_token = "[PAD]", "[SEP]"
    given = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3, "bf16": False}
    given |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    rows = [{"prompt": f"say {i}", "chosen": " yes" * (1 + i % 3), "rejected": " no"} for i in range(8)]
    if kind == "SFTTrainer":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]

    def made(folder):
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLM, "vocab_size": len(tokenizer)}))
        lora = LoraConfig(r=2, target_modules=r".*layers\.[23]\..*(q|v)_proj", task_type="CAUSAL_LM")
        trainer, config = (SFTTrainer, SFTConfig) if kind == "SFTTrainer" else (DPOTrainer, DPOConfig)
        args = config(str(tmp_path / folder), **given)
        data = Dataset.from_list(rows)
        return trainer(base, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)

    plain, trainer = made("plain"), made("run")
    plain.train()
    store = store_frozen(trainer)
    trainer.train()
    assert store.hits >= 2 * store.misses
    mine, theirs = (dict(each.model.named_parameters()) for each in (trainer, plain))
    assert all(mine[name].allclose(value, rtol=1e-3, atol=1e-4) for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["store", "weightlora", "weightlora_plus"])
def test_two_processes_train_what_one_does(what, tmp_path):
    """With a store, and with the methods whose first steps are taken before the trainer wraps the model."""
    worker = Path(__file__).parents[1] / "distributed_worker.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, words in (("one", [sys.executable]), ("two", launch)):
        command = [*words, str(worker), "llama", str(tmp_path / name), what]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "trained.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].allclose(two[key], atol=1e-5) for key in one)
    if what == "store":
        assert {path.name for path in (tmp_path / "two" / "states").iterdir()} == {"process-0", "process-1"}


def bare(folder, **arguments):
    """A trainer on a model that has no adapters yet, of 240 rows and three epochs: 360 steps."""
    model = model_of("Llama").unload()
    given = {"per_device_train_batch_size": 2, **arguments}
    return trainer_of(folder, "Llama", model=model, rows=rows_of_family("Llama", 240), **given)


ABOVE = LoraConfig(r=2, target_modules=r".*layers\.[23]\..*_proj")


@pytest.mark.parametrize("store", [True, {"limit": "3kB"}])
def test_select_for_stores_what_its_plan_leaves_frozen(store, tmp_path):
    trainer = bare(tmp_path, num_train_epochs=1.0, max_steps=6, per_device_train_batch_size=80)
    plan = weightlora.select_for(
        trainer, lora=ABOVE, adapters=3, rule="first_order", steps=2, store=store, progress=False
    )
    assert plan.options["epochs"] == 2.0
    [held] = [callback._store for callback in trainer.callback_handler.callbacks if isinstance(callback, StoreCallback)]
    trainer.train()
    assert held.hits == 240 if store is True else 0 < held.hits < 240
    assert held.floor == "2 of 4 blocks of model.layers" or "3 of 4" in held.floor


@pytest.mark.parametrize("bar", [True, False])
def test_a_script_that_shows_no_log_sees_two_lines_where_it_has_a_bar(bar, tmp_path, capsys):
    """The first line stands before the training, the second after an epoch."""
    trainer = bare(tmp_path, num_train_epochs=2.0, per_device_train_batch_size=80, disable_tqdm=not bar)
    weightlora.select_for(trainer, lora=ABOVE, adapters=3, rule="first_order", steps=2, store=True, progress=False)
    before = capsys.readouterr().out
    assert ("are stored in the first epoch, about " in before) == bar
    trainer.train()
    assert ("\n240 rows are stored, " in "\n" + capsys.readouterr().out) == bar


def test_time_with_a_store_is_that_of_the_whole_run(tmp_path):
    """Its selection included, so that a plan for other epochs is another one."""
    plan = weightlora.select_for(bare(tmp_path / "run"), lora=ABOVE, time=0.9, store=True, progress=False)
    spent = plan.spent["scoring_steps"] / plan.spent["total_steps"]
    assert spent < plan.options["run_time"] <= 0.9
    assert plan.options["run_time"] < spent + plan.options["step_time"]
    assert (plan.options["epochs"], len(plan.options["floor_times"]), plan.spent["total_steps"]) == (3.0, 5, 360)
    again = weightlora.select_for(bare(tmp_path / "run"), lora=ABOVE, time=0.9, store=True, progress=False)
    assert again == plan
    (tmp_path / "run" / "checkpoint-1").mkdir()
    for others in ({"store": True, "num_train_epochs": 2.0}, {"store": False}):
        trainer = bare(tmp_path / "run", **{k: v for k, v in others.items() if k != "store"})
        with pytest.raises(OptionError, match=r"epochs=3\.0 there, .* now"):
            weightlora.select_for(trainer, lora=ABOVE, time=0.9, store=others["store"], progress=False)


def test_a_time_in_which_no_layer_fits_is_told_in_steps_of_lora(tmp_path):
    """A rule that is named keeps layers for all of the steps."""
    with pytest.raises(OptionError, match=r"train LoRA on all sites for 7 steps, which take as long$") as error:
        weightlora.select_for(
            bare(tmp_path), lora=ABOVE, time=0.02, rule="first_order", steps=2, store=True, progress=False
        )
    assert "takes 0." in str(error.value)
    assert "\n" not in str(error.value)


ALL = LoraConfig(r=2, target_modules=r".*layers\..*_proj")


def test_a_time_too_short_to_select_a_floor_is_fewer_steps_without_a_store(tmp_path, capsys):
    """0.02 of 360 steps are 7; three steps of selection would be more than a sixth of them."""
    trainer = bare(tmp_path, disable_tqdm=False)
    plan = weightlora.select_for(trainer, lora=ALL, time=0.02, store=True, progress=False)
    assert (plan.rule, plan.spent, plan.step_share, len(plan.names)) == ("uniform", {}, 0.02, 28)
    assert trainer.args.max_steps == 7
    assert "nothing is stored: fewer steps of all layers" in capsys.readouterr().out
    assert not [each for each in trainer.callback_handler.callbacks if isinstance(each, StoreCallback)]


def test_layers_that_all_lie_above_are_stored_where_steps_are_few(tmp_path):
    """The user's own target_modules leave blocks 0 and 1 frozen; 0.4 of 48 steps are more than an epoch."""
    trainer = bare(tmp_path, per_device_train_batch_size=15)
    plan = weightlora.select_for(trainer, lora=ABOVE, time=0.4, store=True, progress=False)
    [held] = [each._store for each in trainer.callback_handler.callbacks if isinstance(each, StoreCallback)]
    assert (plan.rule, held.floor, trainer.args.max_steps) == ("uniform", "2 of 4 blocks of model.layers", 19)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("arguments", [{"num_train_epochs": 1.0}, {"max_steps": 120}])
def test_one_epoch_reads_nothing_back_and_so_nothing_is_stored(arguments, tmp_path, capsys):
    """240 rows in batches of two are 120 steps; the training is the one without a store, bit for bit."""
    trained = []
    for stored in (True, False):
        trainer = bare(tmp_path / str(stored), disable_tqdm=False, **arguments)
        weightlora.select_for(trainer, lora=ABOVE, adapters=3, rule="first_order", steps=2, progress=False)
        if stored:
            store = store_frozen(trainer)
            assert (store.rows, store.expected) == (0, 0)
            assert "of 4 blocks of model.layers" in store.floor
            assert "nothing is stored: a training of one epoch" in capsys.readouterr().out
        trainer.train()
        trained.append(get_peft_model_state_dict(trainer.model))
    assert all(value.equal(trained[1][name]) for name, value in trained[0].items())


@dataclass(frozen=True)
class Growing(Rule):
    """Scores that grow with the depth by a factor."""

    factor: float = 1.0

    def score(self, stage, steps, budget):  # noqa: ARG002 - as any rule
        final = tuple(self.factor ** int(site.block.rsplit(".", 1)[1]) for site in stage.sites)
        list(stage.take(steps[-1]))
        yield steps[-1], Scores((final,), (True,) * len(final), final)


@pytest.mark.parametrize(("factor", "floor"), [(1e-3, False), (1e6, True)])
def test_the_expected_fall_of_the_loss_decides_between_a_floor_and_fewer_steps(factor, floor, tmp_path, monkeypatch):
    """With almost all of it in the lowest block a floor never pays; in the uppermost, what lies below does not."""
    monkeypatch.setattr("weightlora.selection.scoring.DEFAULT_RULE", Growing(factor=factor))
    trainer = bare(tmp_path)
    plan = weightlora.select_for(trainer, lora=ALL, time=0.6, store=True, progress=False)
    blocks = {int(name.split(".")[2]) for name in plan.names}
    assert blocks == {*range(min(blocks), 4)}  # how high it lies is a matter of measured times
    assert (min(blocks) > 0) == floor
    assert len(plan.names) == 7 * len(blocks)  # of a block all layers
    assert {plan.ranks[name] for name in plan.names} == {2}
    assert plan.options["run_time"] == pytest.approx(0.6, abs=2e-3) or plan.step_share == 1
    assert plan.options["run_time"] <= 0.6
    assert trainer.args.max_steps == (int(plan.step_share * 360 + 1e-9) if plan.step_share < 1 else -1)
    assert len(plan.options["floor_gains"]) == 6
    stored = [each for each in trainer.callback_handler.callbacks if isinstance(each, StoreCallback)]
    assert len(stored) == floor
    assert "within the time" in str(plan)
    assert "gains     expected: all 0." in str(plan)
    assert max(map(len, str(plan).splitlines())) <= 80


def test_a_short_run_is_measured_in_two_steps_and_scored_in_one(tmp_path, monkeypatch):
    """Of 48 steps 3; the one in which blocks are timed has no adapters, so that it takes less than a step of LoRA."""
    monkeypatch.setattr("weightlora.selection.scoring.DEFAULT_RULE", Growing(factor=1e-3))
    plan = weightlora.select_for(
        bare(tmp_path, per_device_train_batch_size=15), lora=ALL, time=0.6, store=True, progress=False
    )
    assert plan.spent == {"scoring_steps": 3, "total_steps": 48}
    assert len(plan.names) == 28  # all layers, so that the rest of the time is steps of LoRA
    assert 0.6 - 3 / 48 < plan.step_share < 0.6 - 2 / 48


def test_one_batch_has_scores_without_errors(tmp_path):
    plan = weightlora.select_for(
        bare(tmp_path, per_device_train_batch_size=15), lora=ALL, time=0.6, store=True, progress=False
    )
    assert (plan.rule, plan.options["steps"], len(plan.history)) == ("first_order", 1, 1)
    assert all(entry.score > 0 and entry.score_error is None for entry in plan.entries)


def test_parameters_hold_above_the_floor_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("weightlora.selection.scoring.DEFAULT_RULE", Growing(factor=1e6))
    plan = weightlora.select_for(bare(tmp_path), lora=ALL, time=0.6, parameters=0.125, store=True, progress=False)
    assert {plan.ranks[name] for name in plan.names} == {1}  # half of the rank on a quarter of the layers
    assert plan.parameters <= 0.125 * plan.lora_parameters


def test_a_base_in_4_bit_keeps_its_weights_with_dropout_off_below(tmp_path):
    """In evaluation mode bitsandbytes may pack them for good, so that each later pass would be another."""
    config = transformers.LlamaConfig(**{**LLM, "hidden_size": 64, "intermediate_size": 64}, attention_dropout=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four, device_map={"": "cpu"}
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r".*layers\.[23]\..*(q|v)_proj"))
    packed = [p for p in model.parameters() if "quant_state" in vars(p)]
    modes = []
    find_floor(model).blocks[0].self_attn.q_proj.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    before = [p.detach().clone() for p in packed]
    trainer = trainer_of(tmp_path / "run", "Llama", model=model)
    store = store_frozen(trainer, dropout="off below")
    filling = len(modes)
    trainer.train()
    assert (store.hits, store.misses) == (2 * ROWS, ROWS)
    assert len(packed) == 28
    assert all(map(torch.equal, packed, before))
    assert all(modes[filling:])


# -- weights that leave the device -------------------------------------------------------------------------------------


class Emptied(prefixes.Offload):
    """On a machine with a CPU alone: nothing is where the weights were, so that whoever used them would fail."""

    def _while_away(self, kept):
        return kept.new_empty(0)


def weights_below(model):
    return [p for block in list(find_floor(model).blocks)[:2] for p in block.parameters()]


@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_weights_below_are_away_in_later_epochs_and_back_for_evaluation(family, tmp_path, monkeypatch):
    monkeypatch.setattr(prefixes, "Offload", Emptied)
    plain = trainer_of(tmp_path / "plain", family)
    plain.train()
    trainer = trainer_of(tmp_path / "run", family, save_strategy="epoch")
    store = store_frozen(trainer, offload=True)
    below = weights_below(trainer.model)
    whole, seen = [p.detach().clone() for p in below], []

    class Notes(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(sum(p.numel() for p in below))

        def on_epoch_end(self, *_, **__):
            trainer.evaluate(rows_of_family(family))
            seen.append("evaluated" if all(map(torch.equal, below, whole)) else "not whole")

    trainer.add_callback(Notes())
    trainer.train()
    every = sum(p.numel() for p in whole)
    assert seen == [*[every] * 3, "evaluated", *[0] * 3, "evaluated", *[0] * 3, "evaluated"]
    assert (store.hits, store.misses) == (2 * ROWS, ROWS)
    assert all(map(torch.equal, below, whole))
    mine, theirs = (dict(t.model.named_parameters()) for t in (trainer, plain))
    assert all(mine[name].allclose(value, rtol=1e-3, atol=1e-4) for name, value in theirs.items())
    saved = load_file(tmp_path / "run" / "checkpoint-9" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    if family == "Llama":
        trainer.model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)


def test_generation_in_the_middle_of_a_training_has_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(prefixes, "Offload", Emptied)
    trainer = trainer_of(tmp_path, "Llama")
    prompt, made = torch.ones(1, 2, dtype=torch.long), []
    store_frozen(trainer, offload=True)

    class Generates(TrainerCallback):
        def on_step_end(self, *_, model, **__):
            model.eval()
            made.append(model.generate(prompt, max_new_tokens=2).shape)
            model.train()

    trainer.add_callback(Generates())
    trainer.train()
    assert made == [(1, 4)] * 9


def test_weights_stay_where_rows_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(prefixes, "Offload", Emptied)
    trainer = trainer_of(tmp_path, "Llama")
    below, seen = weights_below(trainer.model), []
    store = store_frozen(trainer, limit="3kB", offload=True)
    find_floor(trainer.model).blocks[3].register_forward_pre_hook(lambda *_: seen.append(below[0].numel()))
    trainer.train()
    assert store.is_full
    assert min(seen) > 0


def test_shared_and_8_bit_weights_do_not_leave():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(nn.Sequential(shared, nn.Linear(3, 3)), shared)
    assert prefixes.Offload(net, [net[0]]).bytes == (9 + 3) * 4
    vars(net[0][1].weight)["SCB"] = None
    with pytest.raises(OptionError, match="load_in_8bit"):
        prefixes.Offload(net, [net[0]])


# -- refused, or told ------------------------------------------------------------------------------------------------


def test_dropout_below_the_floor_is_refused_unless_it_is_switched_off(tmp_path):
    FAMILIES["noisy"] = (FAMILIES["BERT"][0], {**WIDE, "hidden_dropout_prob": 0.1}, FAMILIES["BERT"][2])
    try:
        with pytest.raises(OptionError, match=r"draw random numbers.*dropout='off below'"):
            store_frozen(trainer_of(tmp_path, "noisy", rows=rows_of_family("BERT")))
        trainer = trainer_of(tmp_path, "noisy", rows=rows_of_family("BERT"))
        store = store_frozen(trainer, dropout="off below")
        trainer.train()
        assert store.hits == 2 * ROWS
    finally:
        del FAMILIES["noisy"]


@pytest.mark.parametrize(
    ("targets", "saved", "words"),
    [
        (r".*layers\.[0-3]\..*q_proj", None, "the lowest block of model.layers is trained"),
        (r".*layers\.3\..*q_proj|.*embed_tokens", None, "embed_tokens.* is trained and runs before"),
        (r".*layers\.3\..*q_proj", ["embed_tokens"], "embed_tokens.* is trained and runs before"),
    ],
)
def test_what_is_trained_below_is_refused(targets, saved, words, tmp_path):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
    with pytest.raises(OptionError, match=words):
        store_frozen(trainer_of(tmp_path, "Llama", model=model))
    model.train()
    assert model(**padded(rows_of_family("Llama"))).loss.requires_grad, "the model is as it was"


def test_blocks_that_pass_on_more_than_hidden_states_are_refused(tmp_path):
    torch.manual_seed(0)
    fields = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2}
    config = transformers.T5Config(**fields, dropout_rate=0.0, decoder_start_token_id=0)
    base = transformers.T5ForConditionalGeneration(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r"encoder\.block\.3\..*q"))
    with pytest.raises(OptionError, match="store"):
        store_frozen(trainer_of(tmp_path, "Llama", model=model))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtype": "int8"}, "dtype='int8'"), ({"dropout": "off"}, "dropout='off'"), ({"limit": "much"}, "memory='much'")],
)
def test_options_out_of_range_are_one_line(options, words, tmp_path):
    with pytest.raises(OptionError, match=words) as error:
        store_frozen(trainer_of(tmp_path, "Llama"), **options)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_computed_and_the_numbers_stay(tmp_path):
    plain = trainer_of(tmp_path / "plain", "Llama")
    plain.train()
    trainer = trainer_of(tmp_path / "run", "Llama")
    store = store_frozen(trainer, limit="3kB")  # a row takes 3 to 8 tokens of 16 numbers of 4 bytes
    trainer.train()
    assert 0 < store.rows < ROWS
    assert store.bytes <= 3000
    assert store.hits > 0
    mine, theirs = (dict(t.model.named_parameters()) for t in (trainer, plain))
    assert all(mine[name].allclose(value, rtol=1e-3, atol=1e-4) for name, value in theirs.items())


def test_rows_that_change_are_told_and_the_training_goes_on_without(tmp_path):
    class Changing(torch.utils.data.Dataset):
        count = 0

        def __len__(self):
            return ROWS

        def __getitem__(self, i):
            Changing.count += 1
            ids = [3 + (i + Changing.count) % 29] * 4
            return {"input_ids": ids, "attention_mask": [1] * 4, "labels": ids}

    trainer = trainer_of(tmp_path, "Llama", rows=Changing())
    store_frozen(trainer)
    with pytest.warns(WeightLoraWarning, match="of 12 rows of an epoch were not in the store"):
        trainer.train()
    assert trainer.state.global_step == 9


def test_the_estimate_is_what_is_stored(tmp_path):
    trainer = trainer_of(tmp_path, "Llama", per_device_train_batch_size=3)  # all rows are in the first four batches
    store = store_frozen(trainer)
    trainer.train()
    assert store.expected == store.bytes == sum(len(r["input_ids"]) for r in rows_of_family("Llama")) * 16 * 4


# -- the files -------------------------------------------------------------------------------------------------------

HEADER = {"floor": "2 of 4", "weights": "a"}


def filled(folder, count=3):
    store = HiddenFile(folder, HEADER, torch.float32)
    values = {bytes([i]): torch.full((i + 1, 2), float(i)) for i in range(count)}
    for key, value in values.items():
        assert store.put(key, value)
    store.close()
    return values


def test_a_file_gives_back_what_was_put(tmp_path):
    values = filled(tmp_path)
    store = HiddenFile(tmp_path, HEADER, torch.float32)
    assert all(store.get(key).equal(value) for key, value in values.items())
    assert store.bytes == sum(value.numel() * 4 for value in values.values())
    store.close()


@pytest.mark.parametrize("header", [{"floor": "3 of 4"}, {"weights": "b"}])
def test_states_of_another_model_are_refused(header, tmp_path):
    filled(tmp_path)
    with pytest.raises(DataError, match=f"other {next(iter(header))}"):
        HiddenFile(tmp_path, {**HEADER, **header}, torch.float32)
    with pytest.raises(DataError, match="other dtype"):
        HiddenFile(tmp_path, HEADER, torch.bfloat16)


@pytest.mark.parametrize("damage", ["cut states", "cut line", "a line of text", "a byte"])
def test_what_is_damaged_is_named_and_computed_again(damage, tmp_path):
    values = filled(tmp_path)
    states, index = tmp_path / "hidden.bin", tmp_path / "hidden.jsonl"
    if damage == "cut states":
        states.write_bytes(states.read_bytes()[:-3])
    elif damage == "cut line":
        index.write_text(index.read_text()[:-20])
    elif damage == "a line of text":
        index.write_text("x\n" + index.read_text())
    else:
        content = bytearray(states.read_bytes())
        content[-1] ^= 1
        states.write_bytes(bytes(content))

    def read():
        store = HiddenFile(tmp_path, HEADER, torch.float32)
        return store, {key: store.get(key) for key in values}

    with pytest.warns(WeightLoraWarning, match=r"hidden\.(bin|jsonl)"):
        store, found = read()
    kept = {key for key, value in found.items() if value is not None}
    assert kept == (set(values) if damage == "a line of text" else {b"\x00", b"\x01"})
    assert all(found[key].equal(values[key]) for key in kept)
    for key, value in values.items():
        store.put(key, value)
        assert store.get(key).equal(value)
    store.close()
    again = HiddenFile(tmp_path, HEADER, torch.float32) if damage == "a byte" else None
    if again is not None:
        assert all(again.get(key).equal(value) for key, value in values.items())
        again.close()


@pytest.mark.parametrize("file", ["_states", "_index"])
def test_a_full_disk_keeps_what_is_there_and_tells_once(file, tmp_path, monkeypatch):
    values = filled(tmp_path)
    store = HiddenFile(tmp_path, HEADER, torch.float32)
    before = store.bytes

    class Full(type(store._states)):
        def write(self, _content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, file, Full(tmp_path / ("hidden.bin" if file == "_states" else "hidden.jsonl"), "ab"))
    with pytest.warns(WeightLoraWarning, match="No space left on device; 3 rows are stored"):
        assert not store.put(b"new", torch.ones(2, 2))
    assert not store.put(b"newer", torch.ones(2, 2))  # without another warning
    assert (store.is_full, store.bytes, store.get(b"new")) == (True, before, None)
    store.close()
    again = HiddenFile(tmp_path, HEADER, torch.float32)
    assert all(again.get(key).equal(value) for key, value in values.items())
    again.close()


def test_two_processes_do_not_write_one_file(tmp_path):
    store = HiddenFile(tmp_path, HEADER, torch.float32)
    with pytest.raises(OptionError, match="another"):
        HiddenFile(tmp_path, HEADER, torch.float32)
    store.close()
    shutil.rmtree(tmp_path)


def test_a_narrower_type_takes_half_of_the_bytes(tmp_path):
    trainer = trainer_of(tmp_path, "Llama")
    store = store_frozen(trainer, dtype="bfloat16")
    trainer.train()
    assert store.bytes == sum(len(r["input_ids"]) for r in rows_of_family("Llama")) * 16 * 2


def test_a_prefix_without_a_store_leaves_nothing_behind():
    model = model_of("Llama")
    before = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    FrozenPrefix(model, HiddenStore(torch.float32)).remove()
    assert {name: dict(module._forward_hooks) for name, module in model.named_modules()} == before
    assert find_floor(model).text == "2 of 4 blocks of model.layers"
