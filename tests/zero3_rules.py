"""``select_for`` under every rule that reads gradients, weights or inputs: zero3_rules.py FOLDER (see .ci/zero3).

Two processes under ZeRO-3 write their plans into FOLDER; one process then compares its own with them.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from study_rules import BY_GRADIENT
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import weightlora
from weightlora.model.distributed import is_first, process_count
from weightlora.model.gathering import is_partitioned
from weightlora.plan.plan import AdapterPlan

# plop draws Gaussian vectors for the tokens of each process: its scores differ with their number.
RULES = (
    "first_order",
    "pursuit",
    "integrated_ranks",
    *BY_GRADIENT.values(),
    "paper",
    "kappa_tune",
)
ROUNDING = 1e-5

folder = Path(sys.argv[1])
generator = torch.Generator().manual_seed(3)
rows = [{"input_ids": torch.randint(5, 900, (8,), generator=generator), "labels": i % 2} for i in range(48)]
for rule, checkpointed in [(rule, False) for rule in RULES] + [("first_order", True)]:
    name = f"{rule.partition(':')[0]}-{checkpointed}.json"
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
