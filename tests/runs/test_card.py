"""The model card shows names as they are written."""

import pytest
from huggingface_hub import ModelCard
from user_texts import assert_plain, plan_with, texts

from weightlora.runs._adapter import _write_card


@pytest.mark.parametrize("text", texts(3, 20), ids=lambda _: "text")
def test_the_card_has_one_row_for_each_projection(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n\n# Model\n", encoding="utf-8")
    plan = plan_with(text, name="layer.0." + text)
    _write_card(path, plan)
    body = ModelCard.load(path).text.partition("## Selection")[2]
    assert_plain(body)
    *_, row = body.rstrip("\n").splitlines()
    assert len([i for i, c in enumerate(row) if c == "|" and (len(row[:i]) - len(row[:i].rstrip("\\"))) % 2 == 0]) == 5
    assert "<b>" not in row.replace("\\<b\\>", "")
    assert body.count("\n| ") == 3  # header, line, one row
