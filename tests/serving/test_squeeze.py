"""An adapter within one budget: against a slow dense SVD, stock PEFT afterwards, and whole or not at all."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_adapters import (
    ALL,
    COMPUTE,
    HOLES,
    LAYERS,
    SHAPES,
    TOKENS,
    base_model,
    by_patterns,
    everywhere,
    logits,
    pairs,
    site,
)
from transformers import AutoTokenizer, BertConfig, BertModel

import weightlora
from weightlora.cli import main
from weightlora.errors import OptionError, OutputError, PlanError, SelectionError, ServingError, WeightLoraError
from weightlora.serving import reader_of
from weightlora.serving.adapter import read_files
from weightlora.serving.check import check, find_problems
from weightlora.serving.moments import adapter_moments, find_directions, kept_ranks
from weightlora.serving.squeeze import squeeze
from weightlora.tasks.embedded import minilm


def numbers(folder):
    """Numbers in A and B, as they are in the file."""
    return sum(a.numel() + b.numel() for a, b in pairs(folder).values())


def slow_ranks(wanted, prices, most):
    """The greedy choice over dense singular values, written down anew: site → rank."""
    values = {name: torch.linalg.svdvals(delta) ** 2 for name, delta in wanted.items()}
    lot = [(float(v) / prices[n], n) for n, own in values.items() for v in own if v > 1e-12 * own[0]]
    ranks = dict.fromkeys(wanted, 0)
    for _, name in sorted(lot, key=lambda pair: -pair[0]):
        if prices[name] <= most:
            most -= prices[name]
            ranks[name] += 1
    return ranks


def truncated(delta, k):
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :k] * s[:k]) @ v[:k]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_it_is_the_dense_svd_of_all_sites(adapter, share, tmp_path):
    wanted, own = by_patterns(adapter.folder), pairs(adapter.folder)
    prices = {name: a.shape[1] + b.shape[0] for name, (a, b) in own.items()}
    most = int(share * sum(prices[name] * len(a) for name, (a, _) in own.items()))
    squeezed = squeeze(adapter.folder, tmp_path / "out", parameters=share)
    ranks = slow_ranks(wanted, prices, most)
    assert squeezed.plan.ranks == ranks
    found = by_patterns(tmp_path / "out")
    assert found.keys() == {name for name, r in ranks.items() if r}
    for name, delta in found.items():
        assert torch.allclose(delta, truncated(wanted[name], ranks[name]), atol=2e-6)
    lost = sum(float(((wanted[n] - found.get(n, 0.0)) ** 2).sum()) for n in wanted)
    assert squeezed.error == pytest.approx(lost / sum(float((d**2).sum()) for d in wanted.values()), rel=1e-4)
    assert numbers(tmp_path / "out") == squeezed.plan.parameters <= most


@pytest.mark.sampled(5)
def test_a_full_budget_gives_the_same_logits(adapter, tmp_path):
    squeeze(adapter.folder, tmp_path / "out", parameters=1.0)
    assert torch.allclose(logits(adapter.base, tmp_path / "out"), adapter.logits, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert isinstance(config["lora_alpha"], int)
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]


def test_what_keeps_its_rank_keeps_its_bits(save, tmp_path):
    saved = save(target_modules=ALL)
    squeeze(saved.folder, tmp_path / "out", parameters=1.0)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (saved.folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_directions_are_worse(save, tmp_path):
    """Negative control: as many directions of each site as the squeeze keeps, drawn at random."""
    saved = save(target_modules=ALL, r=8)
    squeezed = squeeze(saved.folder, tmp_path / "out", parameters=0.3)
    wanted, lot = by_patterns(saved.folder), torch.Generator().manual_seed(0)
    lost = 0.0
    for name, delta in wanted.items():
        values = torch.linalg.svdvals(delta)[:8] ** 2
        lost += float(values[torch.randperm(8, generator=lot)[squeezed.plan.ranks[name] :]].sum())
    total = sum(float((delta**2).sum()) for delta in wanted.values())
    assert squeezed.error < 0.8 * lost / total


def test_one_budget_loses_less_than_one_rank_for_all_sites(save, tmp_path):
    saved = save(target_modules=ALL, r=8, alpha_pattern={"up_proj": 40})  # of unequal size, as trained ones are
    even = squeeze(saved.folder, tmp_path / "even", max_rank=2)
    assert squeeze(saved.folder, tmp_path / "out", parameters=even.plan.parameters).error < even.error


@pytest.mark.parametrize("seed", range(6))
def test_random_adapters_within_random_limits(seed, save, tmp_path):
    lot = random.Random(seed)
    names = lot.sample(ALL, lot.randint(2, len(ALL)))
    patterns = {
        field: {name: lot.choice(values) for name in lot.sample(names, len(names) // 2)}
        for field, values in (("rank_pattern", (1, 2, 5, 40)), ("alpha_pattern", (1, 8, 8.5)))
    }
    saved = save(target_modules=names, use_rslora=lot.random() < 0.5, lora_alpha=lot.choice((4, 7.5)), **patterns)
    size = (saved.folder / "adapter_model.safetensors").stat().st_size
    limits = {"parameters": lot.uniform(0.3, 1), "max_rank": lot.randint(1, 9), "file_size": f"{0.6 * size / 1e3}kB"}
    limits = {name: limits[name] for name in lot.sample(sorted(limits), lot.randint(1, 3))}
    squeezed, out = squeeze(saved.folder, tmp_path / "out", **limits), tmp_path / "out"
    assert numbers(out) <= limits.get("parameters", 1) * numbers(saved.folder)
    assert max(len(a) for a, _ in pairs(out).values()) <= limits.get("max_rank", 40)
    assert (out / "adapter_model.safetensors").stat().st_size <= (0.6 if "file_size" in limits else 1.1) * size
    wanted, found = by_patterns(saved.folder), by_patterns(out)
    for name, delta in found.items():
        assert torch.allclose(delta, truncated(wanted[name], squeezed.plan.ranks[name]), atol=1e-5)
    assert torch.allclose(COMPUTE["llama.cpp"](out, LAYERS)[name], found[name], atol=1e-6)  # one alpha


def test_an_error_is_kept_with_as_few_directions_as_it_takes(save, tmp_path):
    saved = save(target_modules=ALL, r=8)
    squeezed = squeeze(saved.folder, tmp_path / "out", error=0.1)
    assert squeezed.error <= 0.1
    fewer = squeeze(saved.folder, tmp_path / "fewer", parameters=squeezed.plan.parameters - 1)
    assert fewer.error > 0.1


def test_the_choice_is_near_the_best_of_all():
    """The relaxed optimum is at most one direction better: what a greedy choice of falling values guarantees."""
    lot = random.Random(0)
    for _ in range(200):
        gains = [sorted((lot.random() for _ in range(3)), reverse=True) for _ in range(3)]
        prices, most = [lot.randint(1, 4) for _ in gains], lot.randint(4, 20)
        ranks = kept_ranks(gains, prices, most, 0.0)
        cost = sum(r * price for r, price in zip(ranks, prices, strict=True))
        held = sum(sum(own[:r]) for own, r in zip(gains, ranks, strict=True))
        every = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
        fits = [e for e in every if sum(r * price for r, price in zip(e, prices, strict=True)) <= most]
        best = max(sum(sum(own[:r]) for own, r in zip(gains, e, strict=True)) for e in fits)
        assert cost <= most
        assert held >= best - max(max(own) for own in gains)


# -- data --------------------------------------------------------------------------------------------------------------


def inputs_of(model, names, batch):
    """What each layer is given, (tokens, in)."""
    seen, handles = {}, []
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        handles.append(
            layer.register_forward_pre_hook(lambda _m, args, n=name: seen.update({n: args[0].flatten(0, -2).double()}))
        )
    with torch.no_grad():
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return seen


def test_with_data_the_error_of_the_outputs_is_the_least(save, tmp_path):
    saved = save(target_modules=ALL, r=8)
    model = PeftModel.from_pretrained(base_model(saved.base), saved.folder)
    seen = inputs_of(model, ALL, TOKENS)
    moments = adapter_moments(model, [{"input_ids": TOKENS}])
    wanted, own = by_patterns(saved.folder), pairs(saved.folder)
    for name, (a, _) in own.items():
        assert torch.allclose(moments[name], (seen[name] @ a.T).T @ (seen[name] @ a.T) / len(seen[name]), atol=1e-6)

    def lost(folder):
        found = by_patterns(folder)
        return sum(float(((wanted[n] - found.get(n, 0.0)) @ seen[n].T).square().sum()) / len(seen[n]) for n in wanted)

    weighted = squeeze(saved.folder, tmp_path / "weighted", parameters=0.3, moments=moments)
    squeeze(saved.folder, tmp_path / "blind", parameters=0.3)
    total = sum(float((wanted[n] @ seen[n].T).square().sum()) / len(seen[n]) for n in wanted)
    assert weighted.error == pytest.approx(lost(tmp_path / "weighted") / total, rel=1e-4)
    assert lost(tmp_path / "weighted") < lost(tmp_path / "blind")
    # Each site alone: the truncated SVD of ΔW·√C, with C the second moments of its inputs.
    name, found = ALL[0], by_patterns(tmp_path / "weighted")
    root = torch.linalg.svd(seen[name] / len(seen[name]) ** 0.5, full_matrices=False)
    half = root.Vh.T * root.S
    k = weighted.plan.ranks[name]
    assert torch.allclose(found[name] @ half, truncated(wanted[name] @ half, k), atol=1e-5)


def test_moments_leave_the_model_as_it_was_and_need_a_batch(save):
    saved = save(target_modules=HOLES)
    model = PeftModel.from_pretrained(base_model(saved.base), saved.folder).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter_moments(model, [{"input_ids": TOKENS}])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(SelectionError, match="batches is empty"):
        adapter_moments(model, [])


# -- readers, heads and folders ----------------------------------------------------------------------------------------


def test_a_reader_with_a_limit_says_yes_after_it(save, tmp_path, capsys):
    saved = save(target_modules=everywhere("v_proj"), r=600, lora_alpha=1200)
    refused = [problem.text for problem in find_problems(read_files(saved.folder), reader_of("vllm"))]
    assert any("rank 600 is above 512" in text for text in refused)
    assert main(["check", str(saved.folder), "--for", "vllm"]) == 1
    assert main(["squeeze", str(saved.folder), "--max_rank", "16", "--output_dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert capsys.readouterr().out.split(maxsplit=1)[1].strip() == "yes"  # without --max-lora-rank
    assert not check(tmp_path / "out", "llama.cpp")


def test_more_ranks_than_the_layer_is_wide_cost_nothing(save, tmp_path):
    """Rank 40 at 16 outputs: 16 directions are all of it."""
    saved = save(target_modules=everywhere("v_proj"), r=40)
    assert squeeze(saved.folder, tmp_path / "out", error=0.0).plan.ranks == dict.fromkeys(everywhere("v_proj"), 16)
    assert torch.allclose(logits(saved.base, tmp_path / "out"), saved.logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_keep_their_type(dtype, save, tmp_path):
    saved = save(target_modules=ALL, r=8)
    file = saved.folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    wanted = by_patterns(saved.folder)
    squeezed = squeeze(saved.folder, tmp_path / "out", parameters=0.5)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}
    for name, delta in by_patterns(tmp_path / "out").items():  # a product of two roundings
        best = truncated(wanted[name], squeezed.plan.ranks[name])
        assert float((delta - best).norm()) < 2 * torch.finfo(dtype).eps * float(best.norm())


def test_modules_that_were_trained_whole_stay(base, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=everywhere("v_proj"), modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(base_model(base), lora)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    squeezed = squeeze(tmp_path / "adapter", tmp_path / "out", parameters=1.0)
    assert squeezed.plan.parameters == numbers_of(tmp_path / "out")
    assert torch.allclose(logits(base, tmp_path / "out"), logits(base, tmp_path / "adapter"), atol=1e-5)


def numbers_of(folder):
    return sum(t.numel() for name, t in load_file(folder / "adapter_model.safetensors").items() if ".lora_" in name)


def test_a_trained_bias_stays_where_the_adapter_goes(tmp_path):
    """PEFT keeps it inside of its layer; where there is none any more, it is the plain layer's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    lora = LoraConfig(r=2, target_modules=["0", "1"], bias="lora_only", init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        parameter.data.mul_(1e-6 if name.endswith("1.lora_B.default.weight") else 1)
        parameter.data.add_(1.0 if name.endswith(".bias") else 0)
    tuned.save_pretrained(tmp_path / "adapter")
    assert squeeze(tmp_path / "adapter", tmp_path / "out", parameters=0.5).plan.ranks == {"0": 2, "1": 0}
    fresh = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    fresh.load_state_dict(start)
    x = torch.ones(1, 6)
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path / "out")(x), tuned(x), atol=1e-4)


def test_what_it_writes(save, tmp_path, capsys):
    saved = save(target_modules=ALL, r=8)
    words = ["squeeze", str(saved.folder), "--parameters", "0.25", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "8→" in said
    assert "of the squared norm is lost" in said
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "plan.json", "plan.png"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(re.search(rf"\| {re.escape(name)} \| 8 \| [0-8] \| [\d.]+% \|", card.replace("\\", "")) for name in ALL)
    assert main(words) == 0  # its own folder is replaced
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert main(words) == 2
    assert "thesis.txt" in capsys.readouterr().err


FIELDS = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_not_plain_lora_is_refused(field, save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"))
    shutil.copytree(saved.folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **FIELDS[field]}))
    with pytest.raises(ServingError, match=f"{field}=.*only plain LoRA"):
        squeeze(tmp_path / "adapter", tmp_path / "out", parameters=0.5)
    assert not (tmp_path / "out").exists()


def test_dora_as_peft_saves_it_is_refused(save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"), use_dora=True)
    with pytest.raises(ServingError, match=r"magnitude|use_dora"):
        squeeze(saved.folder, tmp_path / "out", parameters=0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give parameters, max_rank, file_size or error"),
        (["--parameters", "0"], "parameters=0 is not allowed"),
        (["--parameters", "1.5"], "parameters=1.5 is not allowed"),
        (["--parameters", "many"], "parameters='many' is not allowed"),
        (["--max_rank", "0"], "max_rank='0' is not allowed"),
        (["--max_rank", "2.5"], "max_rank='2.5' is not allowed"),
        (["--file_size", "10"], "file_size='10' is not allowed"),
        (["--file_size", "100kB", "--error", "1"], "error='1' is not allowed"),
        (["--error", "nan"], "error='nan' is not allowed"),
        (["--parameters", "3"], "no direction fits parameters=3"),
        (["--file_size", "0.9kB"], "no direction fits file_size='0.9kB'"),
        (["--max_rank", "1", "--error", "0.01"], "more than error=0.01"),
        (["--keep", "3"], "--keep"),
    ],
)
def test_mistakes_are_one_line(words, said, save, tmp_path, capsys):
    saved = save(target_modules=everywhere("v_proj"))
    capsys.readouterr()
    assert main(["squeeze", str(saved.folder), *words, "--output_dir", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert (output.err.count("\n"), output.out) == (1, "")
    assert not any(tmp_path.iterdir())


def test_numbers_that_are_none(save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"))
    shutil.copytree(saved.folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, file)
    with pytest.raises(PlanError, match="changes nothing"):
        squeeze(tmp_path / "adapter", tmp_path / "out", parameters=0.5)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file)
    with pytest.raises(PlanError, match="not finite"):
        squeeze(tmp_path / "adapter", tmp_path / "out", parameters=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["adapter", "adapter/small", "."])
def test_the_adapter_is_not_touched(output, save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"))
    shutil.copytree(saved.folder, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(OutputError):
        squeeze(tmp_path / "adapter", tmp_path / output, parameters=0.5)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}


def test_a_full_disk_leaves_what_was_there(save, tmp_path, monkeypatch):
    saved = save(target_modules=everywhere("v_proj"))
    squeeze(saved.folder, tmp_path / "out", parameters=0.5)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weightlora.serving.squeeze.write_tensors", full)
    with pytest.raises(OutputError, match="No space left"):
        squeeze(saved.folder, tmp_path / "out", parameters=0.25)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_every_error_is_ours(save, tmp_path):
    """Random limits of the wrong kinds, as a script may give them."""
    saved = save(target_modules=everywhere("v_proj"))
    lot = random.Random(0)
    values = [None, 0, -1, 2.5, "x", "5", True, float("inf"), [], {}]
    for _ in range(60):
        limits = {name: lot.choice(values) for name in ("parameters", "max_rank", "file_size", "error")}
        with suppress(WeightLoraError):
            squeeze(saved.folder, tmp_path / "out", **limits)


def test_moments_of_other_sites(save, tmp_path):
    saved = save(target_modules=everywhere("v_proj"))
    with pytest.raises(OptionError, match="moments has nothing of"):
        squeeze(saved.folder, tmp_path / "out", parameters=0.5, moments={site(0, "v_proj"): torch.eye(4)})
    with pytest.raises(OptionError, match=r"shape \(8, 8\): its rank is 4"):
        squeeze(saved.folder, tmp_path / "out", max_rank=2, moments=dict.fromkeys(everywhere("v_proj"), torch.eye(8)))


def test_the_name_at_the_top(save, tmp_path):
    saved = save(**SHAPES["ranks and alphas"])
    assert weightlora.squeeze(saved.folder, tmp_path / "out", parameters=0.5).folder == tmp_path / "out"


def test_a_direction_needs_no_product():
    """Float64, against the dense product, also where A or B has more rows or columns than it needs."""
    lot = torch.Generator().manual_seed(0)
    for r, into, out in ((1, 1, 1), (4, 7, 9), (8, 3, 5), (5, 40, 2)):
        a, b = torch.randn(r, into, generator=lot), torch.randn(out, r, generator=lot)
        found = find_directions(a, b, 1.5)
        dense = torch.linalg.svdvals(1.5 * b.double() @ a.double())
        assert torch.allclose(
            torch.tensor(found.gains, dtype=torch.float64), dense[: len(found.gains)] ** 2, rtol=1e-12
        )
        k = sum(gain > 0 for gain in found.gains)
        new_a, new_b = found.cut(a, b, k, 3.0)
        assert torch.allclose(3.0 * new_b @ new_a, 1.5 * b.double() @ a.double(), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_killed_squeeze_leaves_no_folder(save, tmp_path):
    saved = save(target_modules=ALL, r=512)
    for wait in (2.0, 3.0, 4.0, 5.0):
        words = ["squeeze", str(saved.folder), "--parameters", "0.5", "--output_dir", str(tmp_path / "out")]
        process = subprocess.Popen(
            [sys.executable, "-m", "weightlora", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():  # it was finished: then it is whole
            assert read_files(tmp_path / "out").sites
            shutil.rmtree(tmp_path / "out")
    squeeze(saved.folder, tmp_path / "out", parameters=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- rows on the command line ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_bert):
    """An adapter of a classifier with a head of its own, trained by the command line, and the options of its rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [f"a {word} film number {i},{word}" for i in range(16) for word in ("good", "bad")]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    file = str(folder / "rows.csv")
    options = [
        "--task",
        "text_classification",
        "--train_file",
        file,
        "--validation_file",
        file,
        "--max_seq_length",
        "12",
    ]
    options += ["--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "true"]
    words = [
        "--model_name_or_path",
        str(small_bert),
        "--method",
        "lora",
        "--max_steps",
        "60",
        "--learning_rate",
        "3e-2",
    ]
    assert main(["train", *options, *words, "--report_to", "none", "--output_dir", str(folder / "run")]) == 0
    return folder / "run", options


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_weight_the_directions_and_are_measured(trained, tmp_path, capsys):
    run, options = trained
    assert main(["squeeze", str(run), "--parameters", "1.0", *options, "--output_dir", str(tmp_path / "whole")]) == 0
    before, after = re.search(r"validation_loss (\S+) → (\S+)", capsys.readouterr().out).groups()
    stored = json.loads((run / "results.json").read_text())["metrics"]["validation_loss"]
    assert before == after == f"{stored:.4g}"  # the head is the trained one
    words = ["squeeze", str(run), "--parameters", "0.1"]
    assert main([*words, *options, "--output_dir", str(tmp_path / "weighted")]) == 0
    assert main([*words, "--output_dir", str(tmp_path / "blind")]) == 0
    weighted, blind = (by_patterns_of(tmp_path / name) for name in ("weighted", "blind"))
    assert any(name not in blind or not torch.allclose(weighted[name], blind[name]) for name in weighted)


def by_patterns_of(folder):
    """As ``by_patterns``, of an adapter with a head."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "3"], "--seed is for rows; give --task"),
        (["--task", "text_classification"], "train_file"),
        (
            ["--task", "roget", "--train_file", "none.csv", "--file_size", "10"],
            "file_size='10' is not allowed",
        ),  # first
        (["--task", "roget", "--batches", "0"], "batches='0' is not allowed"),
        (["--task", "roget", "--paramters", "3"], "paramters"),
        (["--task", "roget", "--max_train_samples", "64"], "does not fit"),  # another number of classes
    ],
)
@pytest.mark.filterwarnings("ignore:no training row has the label")
def test_mistakes_with_rows_are_one_line(words, said, trained, tmp_path, capsys):
    run, _ = trained
    capsys.readouterr()
    words = ["squeeze", str(run), "--parameters", "0.5", *words, "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1
    assert not any(tmp_path.iterdir())
