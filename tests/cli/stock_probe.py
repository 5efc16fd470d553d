"""Load every adapter of a demo with stock PEFT, where weightlora cannot be imported; print logits as JSON.

python tests/cli/stock_probe.py runs/demo/adapters MINILM-FOLDER TEXT ...
"""

import json
import sys
from pathlib import Path


class _Blocked:
    """A finder that makes ``import weightlora`` fail as on a machine without it."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] == "weightlora":
            raise ImportError("weightlora is not installed here")


def main(adapters: Path, base_model: str, texts: list[str]) -> None:
    sys.meta_path.insert(0, _Blocked())
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    batch = AutoTokenizer.from_pretrained(base_model)(texts, padding=True, return_tensors="pt")
    logits = {}
    for folder in sorted(adapters.iterdir()):
        base = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=2)
        model = PeftModel.from_pretrained(base, folder).eval()
        carrying = sorted(name for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer))
        assert carrying == json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        with torch.no_grad():
            logits[folder.name] = model(**batch).logits.tolist()
            merged = model.merge_and_unload()(**batch).logits
        torch.testing.assert_close(merged, torch.tensor(logits[folder.name]), rtol=0, atol=1e-5)
    print(json.dumps(logits))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
