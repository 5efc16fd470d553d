"""What .ci/zero3 runs: ``zero3.py files FOLDER``, ``zero3.py compare FOLDER`` and ``zero3.py rules FOLDER``.

``files`` writes what the ZeRO-3 commands of docs/guides/distributed.md name: model, recipes, zero3.yaml. ``exact.yaml``
is the guide's file in fp32, where two processes can be compared with one. ``compare`` fails unless ZeRO-3 in two
processes left what one process did. ``rules`` runs ``select_for`` under every rule that reads gradients, weights or
inputs: two processes under ZeRO-3 write their plans into FOLDER, one process then compares its own with them.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from selecting import BY_GRADIENT
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import weightlora
from weightlora.model.distributed import is_first, process_count
from weightlora.model.gathering import is_partitioned
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.embedded import minilm

# plop draws Gaussian vectors for the tokens of each process: its scores differ with their number.
RULES = (
    "first_order",
    "pursuit",
    "integrated_ranks",
    *BY_GRADIENT.values(),
    "paper",
    "kappa_tune",
)
#: Two processes add halves of a batch in another order: some 1e-7 of a sum's terms, which partly cancel.
ROUNDING = 1e-5


def files(folder):
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks differ with the processes
    torch.manual_seed(0)  # the same weights each time
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "distributed.md").read_text(encoding="utf-8")
    config = guide.partition("# zero3.yaml\n")[2].partition("```")[0]
    assert "mixed_precision: bf16\n" in config
    config = f"{config}use_cpu: true\n"
    (folder / "zero3.yaml").write_text(config)
    (folder / "exact.yaml").write_text(config.replace("mixed_precision: bf16", 'mixed_precision: "no"'))
    for name in ("select.yaml", "recipe.yaml"):
        (folder / name).write_text("task: rotten_tomatoes\nadapters: 5\n")


def compare(folder):
    runs = folder / "runs"
    plan, weights = AdapterPlan.load(runs / "one/plan.json"), load_file(runs / "one/adapter/adapter_model.safetensors")
    largest = max(plan.scores.values())
    for name in ("two", "steps"):
        other, adapter = (
            AdapterPlan.load(runs / name / "plan.json"),
            load_file(runs / name / "adapter/adapter_model.safetensors"),
        )
        score = max(abs(other.scores[site] - plan.scores[site]) for site in plan.scores) / largest
        weight = max(((adapter[key] - value).abs().max() / value.abs().max()).item() for key, value in weights.items())
        trained = sum(bool(value.any()) for key, value in adapter.items() if "lora_B" in key)
        same = (other.names, other.ranks, adapter.keys()) == (plan.names, plan.ranks, weights.keys())
        sys.stdout.write(f"{name}: same sites {same}, scores within {score:.1e}, adapter within {weight:.1e}\n")
        if not same or score > ROUNDING or weight > ROUNDING or trained != len(plan.names):
            raise SystemExit(f"runs/{name} is not what one process left in runs/one")


def rules(folder):
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(5, 900, (8,), generator=generator), "labels": i % 2} for i in range(48)]
    for rule, checkpointed in [(rule, False) for rule in RULES] + [("first_order", True)]:
        name = f"{rule.replace(':', '.')}-{checkpointed}.json"
        arguments = TrainingArguments(
            str(folder / f"rules-{name}"),  # made first: from_pretrained then partitions the weights
            use_cpu=True,
            seed=1,
            max_steps=4,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=checkpointed,
            per_device_train_batch_size=4,
        )
        arguments.per_device_train_batch_size //= process_count()
        base = BertForSequenceClassification.from_pretrained(folder / "model")
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
        assert is_partitioned(model) == (process_count() == 2)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.model_accepts_loss_kwargs = False  # a classifier's loss is a mean, which the Trainer does not see
        if process_count() == 1:
            (folder / f"rules-{name}" / "plan.json").unlink()  # of the two processes, which is in FOLDER as well
        plan = weightlora.select_for(trainer, adapters=2, rule=rule, steps=4)
        assert is_partitioned(model) == (process_count() == 2)
        # PEFT's unload() leaves the copy of the head, which is whole.
        frozen = [p for name, p in model.named_parameters() if not p.requires_grad and "classifier" not in name]
        assert all(p.numel() == 0 for p in frozen) == (process_count() == 2)
        if process_count() == 2 and is_first():
            plan.save(folder / name)
        elif process_count() == 1:
            two = AdapterPlan.load(folder / name)
            largest = max(map(abs, plan.scores.values()))
            apart = max(abs(two.scores[site] - plan.scores[site]) for site in plan.scores) / largest
            sys.stdout.write(f"{name}: same sites {two.names == plan.names}, scores within {apart:.1e}\n")
            if two.names != plan.names or apart > ROUNDING:
                raise SystemExit(f"the plan of {rule} under ZeRO-3 is not that of one process")


if __name__ == "__main__":
    {"files": files, "compare": compare, "rules": rules}[sys.argv[1]](Path(sys.argv[2]))
