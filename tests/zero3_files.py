"""Write what the ZeRO-3 commands of docs/guides/distributed.md name into a folder: model, recipes, zero3.yaml.

``exact.yaml`` is the guide's file in fp32, where two processes can be compared with one.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from weightlora.tasks.embedded import minilm

folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks differ with the number of processes
torch.manual_seed(0)  # the same weights each time
BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")
guide = (Path(__file__).parent.parent / "docs" / "guides" / "distributed.md").read_text(encoding="utf-8")
config = guide.partition("# zero3.yaml\n")[2].partition("```")[0]
assert "mixed_precision: bf16\n" in config
(folder / "zero3.yaml").write_text(f"{config}use_cpu: true\n")
(folder / "exact.yaml").write_text(f"{config}use_cpu: true\n".replace("mixed_precision: bf16", 'mixed_precision: "no"'))
for name in ("select.yaml", "recipe.yaml"):
    (folder / name).write_text("task: rotten_tomatoes\nadapters: 5\n")
