"""What decides the choice: a site that the labels were made with is kept, an idle one is not."""

import pytest
import torch
from conformance import quick
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from weightlora.errors import SelectionError
from weightlora.methods import METHODS, entry_of, options_of
from weightlora.trainer.attach import method_for

READING = [entry.name for entry in METHODS if entry.reads != "nothing"]


class Planted(PreTrainedModel):
    """Two sites side by side; the labels were made by a change of the weights of the first.

    The first is given inputs from a space of six dimensions, the second from one of sixteen.
    """

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"useful": nn.Linear(16, 8)}), nn.ModuleDict({"idle": nn.Linear(16, 8)})]
        )
        self.post_init()

    def forward(self, useful, idle, labels=None):
        hidden = self.layers[0]["useful"](useful) + self.layers[1]["idle"](idle)
        return SequenceClassifierOutput(loss=(hidden - labels).square().mean(), logits=hidden)


USEFUL, IDLE = "layers.0.useful", "layers.1.idle"


def planted(shuffled, seed):
    """The model, and batches whose labels belong to their inputs, or to those of other rows."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Planted(PretrainedConfig())
    teacher = torch.randn(8, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    plane = torch.linalg.qr(torch.randn(16, 6, generator=generator)).Q.T
    useful = 2 * torch.randn(512, 6, generator=generator) @ plane
    idle = torch.randn(512, 16, generator=generator)
    with torch.no_grad():
        labels = model(useful, idle, torch.zeros(512, 8)).logits + useful @ teacher.T
    if shuffled:
        labels = labels[torch.randperm(512, generator=generator)]
    data = {"useful": useful, "idle": idle, "labels": labels}
    return model, [{key: tensor[i : i + 16] for key, tensor in data.items()} for i in range(0, 512, 16)]


def choice(name, tmp_path, shuffled, seed):
    """Ranks of the useful and the idle site at the end of the training."""
    model, batches = planted(shuffled, seed)
    rows = [{key: tensor[i] for key, tensor in batch.items()} for batch in batches for i in range(16)]
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": seed}
    arguments = TrainingArguments(
        str(tmp_path / f"{shuffled}-{seed}"), max_steps=20, per_device_train_batch_size=16, learning_rate=1e-2, **quiet
    )
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["useful", "idle"]))
    trainer = Trainer(lora, arguments, train_dataset=rows)
    # Rounds so far apart that what one has brought is trained when the next looks at it.
    method = method_for(trainer, name, **quick(name, steps=10, interval=4, rounds=3))
    if method.callbacks():
        trainer.train()
    method.export(trainer.model)
    return method.plan.ranks[USEFUL], method.plan.ranks[IDLE]


@pytest.mark.parametrize("name", READING)
def test_a_useful_site_is_kept_and_an_idle_one_is_not(name, tmp_path):
    for seed in range(3):
        useful, idle = choice(name, tmp_path, False, seed)
        assert useful > idle
        if "adapters" in options_of(name):
            assert idle == 0


def choice_of(name, tmp_path, seed):
    """With labels of other rows; the paper's gates may all end below zero."""
    try:
        return choice(name, tmp_path, True, seed)
    except SelectionError:
        if not name.startswith("weightlora"):
            raise
        return 0, 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", READING)
def test_labels_of_other_rows_do_not_lead_to_the_same_choice(name, tmp_path):
    """Methods that read the loss fail, or find no site; those that read the inputs alone never saw the labels."""
    choices = [choice_of(name, tmp_path, seed) for seed in range(6)]
    if entry_of(name).reads == "loss":
        assert not all(useful > idle for useful, idle in choices)
    else:
        assert choices == [choice(name, tmp_path, False, seed) for seed in range(6)]


def test_a_choice_that_is_no_choice_would_be_seen(tmp_path):
    """The control of the two tests above: at random, the idle site is kept as well."""
    lots = [choice("random", tmp_path, False, seed) for seed in range(6)]
    assert not all(useful > idle for useful, idle in lots)
