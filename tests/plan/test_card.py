"""The model card shows names as they are written, and the plan as a picture."""

import re
import sys

import pytest
from fuzz import assert_plain, plan_with, texts
from huggingface_hub import ModelCard
from torch import nn

from weightlora.plan.card import write_card


@pytest.mark.sampled(4)
@pytest.mark.parametrize("text", texts(3, 20), ids=lambda _: "text")
def test_the_card_has_one_row_for_each_projection(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n\n# Model\n", encoding="utf-8")
    plan = plan_with(text, name="layer.0." + text)
    write_card(tmp_path, plan, nn.Identity())
    body = ModelCard.load(path).text.partition("## Selection")[2]
    assert_plain(body)
    *_, row = body.rstrip("\n").splitlines()
    assert len([i for i, c in enumerate(row) if c == "|" and (len(row[:i]) - len(row[:i].rstrip("\\"))) % 2 == 0]) == 5
    assert "<b>" not in row.replace("\\<b\\>", "")
    assert body.count("\n| ") == 3  # header, line, one row


def card_of(folder, plan):
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Model\n", encoding="utf-8")
    write_card(folder, plan, nn.Identity())
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_shows_a_picture_whose_text_is_the_plans_summary(tmp_path):
    text = card_of(tmp_path / "adapter", plan_with("plain"))
    (alt, target), *more = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    assert more == []
    assert (tmp_path / "adapter" / target).read_bytes().startswith(b"\x89PNG")
    assert "1 of 1 sites, 16 adapter parameters (LoRA on all: 16)" in alt  # r·(in + out) = 2·(4 + 4)
    assert alt.isprintable()


def test_without_matplotlib_the_card_is_the_same_without_the_picture(tmp_path, monkeypatch):
    plan = plan_with("plain")
    whole = card_of(tmp_path / "whole", plan)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python says that there is no such package
    bare = card_of(tmp_path / "bare", plan)
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["README.md"]
    assert bare == re.sub(r"!\[.*\n\n", "", whole)
    assert "plan.png" not in bare
