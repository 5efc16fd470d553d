"""The page of `weightlora report` for a run of a 70 B model: 560 sites and 200 scoring steps. Seconds and bytes.

    python benchmarks/report.py                          # prints Markdown
    python benchmarks/report.py --screenshots FOLDER     # the page as pictures, too; needs chromium and playwright

The run's folder is made up: sites and shapes of Llama 3 70B, scores drawn from a seed. The command runs in a process of
its own, whose start is timed, too; that process says at its end whether torch was imported.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite

#: Projection → inputs and outputs of Llama 3 70B.
SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (8192, 1024),
    "self_attn.v_proj": (8192, 1024),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (8192, 28672),
    "mlp.up_proj": (8192, 28672),
    "mlp.down_proj": (28672, 8192),
}
LAYERS, STEPS, LOSSES = 80, 200, 1000
REPORT = """
import sys
from weightlora.cli import main
code = main(["report", *sys.argv[1:]])
print(code, "torch" in sys.modules)
"""


def main() -> None:
    """Make the folder, make the page, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs; default: %(default)s")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [write_run(Path(temporary) / f"seed-{seed}", seed) for seed in (0, 1)]
        page = Path(temporary) / "report.html"
        print("| page | seconds, median | fastest, slowest | MB | without Plotly's code, MB | torch imported |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, given in (("one run", folders[:1]), ("two runs", folders)):
            seconds, loaded = zip(*(report(given, page) for _ in range(arguments.rounds)), strict=True)
            size, code = page.stat().st_size, plotly_bytes()
            times = f"{statistics.median(seconds):.1f} | {min(seconds):.1f}, {max(seconds):.1f}"
            sizes = f"{size / 1e6:.2f} | {(size - code) / 1e6:.2f}"
            print(f"| {name} | {times} | {sizes} | {'yes' if any(loaded) else 'no'} |")
        if arguments.screenshots:
            for picture in take_pictures(page, arguments.screenshots):
                print(f"wrote {picture}")


def write_run(folder: Path, seed: int) -> Path:
    """Write a run's folder as `weightlora train` leaves it, without checkpoints and adapter."""
    lot = random.Random(seed)
    names = sorted(f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in SHAPES)
    scores = {name: lot.lognormvariate(0, 0.8) * (2 if "v_proj" in name else 1) for name in names}
    kept = set(sorted(names, key=scores.__getitem__)[len(names) // 2 :])
    entries = tuple(
        PlannedSite(
            Site(name, *SHAPES[".".join(name.split(".")[3:])]),
            lora_r=16,
            lora_alpha=32,
            r=16 * (name in kept),
            alpha=32,
            score=scores[name],
            score_error=scores[name] / 10,
        )
        for name in names
    )
    history = tuple(
        tuple(scores[name] * (1 + lot.gauss(0, 1) / step**0.5) for name in names) for step in range(1, STEPS + 1)
    )
    options = {"adapters": len(kept), "steps": STEPS, "learning_rate": 1e-4, "agreement": 0.87}
    folder.mkdir()
    plan = AdapterPlan(entries, rule="first_order", options=options, seed=seed, history=history)
    plan.save(folder / "plan.json")
    losses = [[step, 1.2 + 1.5 / step**0.5 + lot.gauss(0, 0.05)] for step in range(1, LOSSES + 1)]
    metrics = {"validation_loss": 1.25, "validation_exact_match": 0.41}
    (folder / "results.json").write_text(json.dumps({"losses": losses, "metrics": metrics}))
    (folder / "config.yaml").write_text(f"method: selected\nadapters: {len(kept)}\nsteps: {STEPS}\nseed: {seed}\n")
    return folder


def report(folders: list[Path], page: Path) -> tuple[float, bool]:
    """Run the command; return its seconds, and whether torch was imported."""
    start = time.perf_counter()
    command = [sys.executable, "-c", REPORT, *map(str, folders), "--output", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, loaded = done.stdout.split()[-2:]
    assert code == "0", done.stdout
    return time.perf_counter() - start, loaded == "True"


def plotly_bytes() -> int:
    """Bytes of Plotly's code, which every page holds."""
    from plotly.offline import get_plotlyjs

    return len(get_plotlyjs().encode())


def take_pictures(page: Path, folder: Path) -> Iterator[Path]:
    """Write the page as it looks on a wide and a narrow screen, light and dark."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                opened = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
                opened.goto(page.as_uri())
                drawn = (
                    "document.querySelectorAll('.js-plotly-plot').length === document.querySelectorAll('.plot').length"
                )
                opened.wait_for_function(drawn)
                picture = folder / f"{width}-{scheme}.png"
                opened.screenshot(path=picture, full_page=True)
                yield picture
        browser.close()


if __name__ == "__main__":
    main()
