"""Time and memory of `squeeze` for an adapter of 1,000 sites of 4096 x 4096 and rank 64.

    python benchmarks/squeeze/scale.py            # prints Markdown
    python benchmarks/squeeze/scale.py --sites 100

The adapter is drawn from a seed and written one site at a time: 1 GB in bfloat16. It is squeezed in a process of its
own, which reads how much memory it holds 20 times a second, beyond what it imports; pages of the file that the system
may drop do not count. Once without matplotlib, which draws a picture of all sites.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weightlora.serving.adapter import matrix_name
from weightlora.serving.write import Planned, write_tensors

WIDTH, R = 4096, 64
SQUEEZE = """
import sys, threading, time
from pathlib import Path
if sys.argv[4] == "picture":
    import matplotlib.pyplot
else:
    sys.modules["matplotlib"] = None  # as where it is not installed
import peft, torch
from weightlora.serving.squeeze import squeeze

def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3

def watch():
    while not done:
        peak[0] = max(peak[0], held())
        time.sleep(0.05)

torch.set_num_threads(int(sys.argv[3]))
torch.linalg.svd(torch.ones(64, 64))
done, before, peak = [], held(), [0.0]
threading.Thread(target=watch, daemon=True).start()
start, cpu = time.perf_counter(), time.process_time()
found = squeeze(sys.argv[1], sys.argv[2], parameters=0.25)
print(time.perf_counter() - start, time.process_time() - cpu, peak[0] - before, found.error)
"""


def main() -> None:
    """Write the adapter, squeeze it, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder) / "adapter", arguments.sites)
        size = (adapter / "adapter_model.safetensors").stat().st_size / 1e6
        print("| | sites | MB before | after | seconds | of the processor | MB held | lost |\n| --- |" + " ---: |" * 7)
        for how in ("no picture", "picture"):
            out = Path(folder) / how
            command = [sys.executable, "-c", SQUEEZE, str(adapter), str(out), str(arguments.threads), how]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, cpu, held, error = map(float, done.stdout.split()[-4:])
            left = (out / "adapter_model.safetensors").stat().st_size / 1e6
            cells = [how, *(f"{n:.0f}" for n in (arguments.sites, size, left, seconds, cpu, held)), f"{error:.1%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def write_adapter(folder: Path, sites: int) -> Path:
    """Write an adapter whose directions fall from 1 to 1/64, more steeply in some sites than in others."""
    folder.mkdir()
    names = sorted(f"model.layers.{number // 7}.self_attn.{number % 7}_proj" for number in range(sites))
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": names, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    planned: dict[str, Planned] = {}
    for name in names:
        for matrix, shape in (("A", (R, WIDTH)), ("B", (WIDTH, R))):
            planned[matrix_name(name, matrix)] = Planned("BF16", shape, partial(drawn, name, matrix, shape))
    start = time.perf_counter()
    write_tensors(folder / "adapter_model.safetensors", planned)
    print(f"wrote {sites} sites in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return folder


def drawn(name: str, matrix: str, shape: tuple[int, int]) -> Tensor:
    """A or B of a site."""
    number = sum(int(part) * 10**i for i, part in enumerate(re.findall(r"\d+", name)))
    lot = torch.Generator().manual_seed(2 * number + (matrix == "B"))
    made = torch.randn(shape, generator=lot) / WIDTH**0.5
    return made * (torch.arange(1, R + 1) ** -(0.5 + number % 5 / 5)) if matrix == "B" else made


if __name__ == "__main__":
    main()
