"""How an adapter of the demo is used where weightlora is not installed: the demo gives this text to a new Python.

python -c "$(cat _plain_peft.py)" ADAPTER BASE < rows.json    # prints the accuracy
"""

import json
import sys


def main(adapter: str, base: str) -> None:
    """Print how many of the rows on standard input get their label, with stock PEFT and transformers alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()
    right = 0
    for start in range(0, len(rows["text"]), 100):
        texts, labels = (rows[name][start : start + 100] for name in ("text", "label"))
        batch = tokenizer(texts, padding=True, truncation=True, max_length=rows["length"], return_tensors="pt")
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(-1) == torch.tensor(labels)).sum())
    assert "weightlora" not in sys.modules
    print(right / len(rows["text"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
