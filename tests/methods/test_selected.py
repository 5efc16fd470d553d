"""Method `selected`: what decides the choice, and `warm_start`, which goes on from the weights of the scoring."""

import pytest
import torch
from conformance import quick
from peft import LoraConfig, PeftModel, get_peft_model
from test_choosing import batches, loss, net
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from weightlora.errors import OptionError, SelectionError
from weightlora.methods import METHODS, entry_of, make_method, options_of
from weightlora.selection.rules.integrated import Integrated
from weightlora.selection.select import select_trained
from weightlora.trainer.attach import method_for

# -- `warm_start`: the training goes on from the weights of the scoring ----------------------------------------------

LORA = LoraConfig(r=2, lora_alpha=6)


class Quick(Integrated):
    """Scores that are read from two batches."""

    probes = 2


RULE = Quick()
OPTIONS = {
    "adapters": 1,
    "rule": RULE,
    "steps": 4,
    "learning_rate": 1e-2,
    "seed": 3,
    "loss_fn": loss,
    "progress": False,
}


def attached(**options):
    method = make_method("selected", **{**OPTIONS, **options})
    return method, method.attach(net(), LORA, batches(6), 100)


def first_loss(model):
    return loss(model, batches(7)[-1]).item()


def test_warm_start_begins_where_the_scoring_ended_and_the_default_at_the_base_model():
    trained = select_trained(net(), batches(6), lora=LORA, **OPTIONS)
    method, warm = attached(warm_start=True)
    cold_method, cold = attached()
    assert first_loss(warm) == first_loss(trained.attach(net()))
    assert first_loss(cold) == first_loss(net())
    assert first_loss(warm) < first_loss(cold)  # the scoring learned something
    assert method.plan.ranks == cold_method.plan.ranks
    assert dict(method.plan.options) == {**cold_method.plan.options, "warm_start": True}


def test_the_result_is_a_stock_checkpoint_on_the_same_base(tmp_path):
    method, warm = attached(warm_start=True)
    optimizer = torch.optim.AdamW([p for p in warm.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        loss(warm, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = method.export(warm)
    exported.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(net(), str(tmp_path))
    x = batches()[0]["x"]
    assert torch.equal(loaded(x), exported(x))
    base = exported.unload().state_dict()
    assert all(torch.equal(base[name], value) for name, value in net().state_dict().items())


@pytest.mark.parametrize("options", [{}, {"rule": "first_order"}, {"rule": "kappa_tune"}])
def test_a_rule_that_trains_nothing_is_refused_before_anything_runs(options):
    with pytest.raises(OptionError, match=r"warm_start=True: rule='.*' trains no adapters"):
        make_method("selected", warm_start=True, **options)
    make_method("selected", warm_start=False, **options)
    make_method("selected", warm_start=True, rule="paper")


def test_a_word_that_is_no_yes_or_no_is_refused():
    with pytest.raises(OptionError, match="warm_start='on' is not allowed: give true or false"):
        make_method("selected", warm_start="on", rule="paper")


def test_ranks_that_grow_cannot_start_warm():
    assert "warm_start" in options_of("selected")
    with pytest.raises(OptionError, match="weightlora_plus has no option 'warm_start'"):
        make_method("weightlora_plus", warm_start=True)


# -- a site that the labels were made with is kept, an idle one is not -----------------------------------------------

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


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(2)
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
