r"""What any choice can gain: the spread of random sets, and a fit of the held-out loss to which sites they keep.

    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#ceiling
    python benchmarks/choice/ceiling.py roget        # the table, the fit, and the best and worst set that it predicts
    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#ceiling \
        benchmarks/results/choice/predicted.yaml#roget

The last command trains the predicted sets; the second one then shows them, too. Options of the benchmark, such as
--head_learning_rate 1.5e-2, go to all three.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import by_seed
from weightlora.files import read_mapping, write_text
from weightlora.model.sites import find_sites
from weightlora.plan.limits import Limits, read_limits
from weightlora.plan.plan import make_plan
from weightlora.runs.recipe import option_words, read_recipe
from weightlora.runs.train import prepare
from weightlora.selection.allocate import site_budget

HERE = Path(__file__).parent
PENALTIES = np.logspace(-2, 3, 26)


def main() -> None:
    """Print the table of a bed, fit the random sets, and write the predicted ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=sorted(read_mapping(HERE / "beds.yaml")))
    asked, words = parser.parse_known_args()
    files = [HERE / f"beds.yaml#{asked.bed}", HERE / "stages.yaml#ceiling"]
    grid = read_grid(files, words=words)
    predicted = asked.bed in known_predictions(grid)
    records = recorded(grid)
    losses, kept = _known(grid, records)
    draws = {label: loss for label, loss in losses.items() if label.startswith("draw")}
    if predicted:
        part = f"{predictions(grid)}#{asked.bed}"
        losses |= _known(read_grid([*files, part], words=words), records)[0]
    _print_table(losses, list(draws.values()))
    sets = distinct(draws, kept)
    sites = sorted(frozenset().union(*sets))
    masks = np.array([[name in own for name in sites] for own in sets], dtype=float)
    share, worth = fit(masks, np.array(list(sets.values())))
    print(
        f"\nA linear fit to {len(sets)} random sets explains {share:.2f} of the variance of sets it has not seen (R²)."
    )
    wanted = sum(row.label.startswith("draw") for row in grid.rows)
    if len(draws) < wanted:
        print(f"{wanted - len(draws)} random sets are still to be trained; then the predicted sets are written.")
    elif not predicted:
        _write_predicted(grid, asked.bed, dict(zip(sites, worth, strict=True)))


def predictions(grid: Grid) -> Path:
    """Return the file of the predicted sets, a part for each bed."""
    return grid.output_dir.parent / "predicted.yaml"


def known_predictions(grid: Grid) -> dict[str, Any]:
    """Return the parts of the file that have been written."""
    return read_mapping(predictions(grid)) if predictions(grid).exists() else {}


def distinct(losses: Mapping[str, float], kept: Mapping[str, Collection[str]]) -> dict[frozenset[str], float]:
    """Return the loss of each set once: of two equal ones, a fit must not have seen one when it predicts the other."""
    return {frozenset(kept[label]): loss for label, loss in losses.items()}


def fit(masks: np.ndarray, losses: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the R² of ridge regression on sets left out one by one, and the loss that each site saves.

    The penalty is the one with the best R²: with so few sets a smaller one would fit their noise.

    Args:
        masks: 1 where a set keeps a site, shape (sets, sites).
        losses: Held-out loss of each set, shape (sets,).
    """
    centred, target = masks - masks.mean(0), losses - losses.mean()
    best, chosen = -np.inf, PENALTIES[-1]
    for penalty in PENALTIES:
        hat = centred @ np.linalg.solve(centred.T @ centred + penalty * np.eye(masks.shape[1]), centred.T)
        leverage = np.diag(hat) + 1 / len(losses)  # of the fit with a constant
        left_out = (target - hat @ target) / (1 - leverage)
        mean_left_out = target * len(losses) / (len(losses) - 1)
        share = 1 - (left_out**2).sum() / (mean_left_out**2).sum()
        if share > best:
            best, chosen = share, penalty
    worth = -np.linalg.solve(centred.T @ centred + chosen * np.eye(masks.shape[1]), centred.T @ target)
    return float(best), worth


def _known(grid: Grid, records: list[Record]) -> tuple[dict[str, float], dict[str, set[str]]]:
    """The loss of each row that has been run, the mean over its seeds, and the sites of its first seed."""
    known = by_key(records)
    losses: dict[str, float] = {}
    kept: dict[str, set[str]] = {}
    for row in grid.rows:
        values = by_seed(grid, row, known)
        if values:
            losses[row.label] = statistics.mean(values.values())
            kept[row.label] = next(
                set(r["kept"]) for r in records if r["status"] == "ok" and row.options.items() <= r["options"].items()
            )
    return losses, kept


def _print_table(losses: dict[str, float], draws: list[float]) -> None:
    mean, spread = statistics.mean(draws), statistics.stdev(draws)
    print("| sites | held-out loss | minus random | in standard deviations of random |")
    print("| --- | ---: | ---: | ---: |")
    for label, loss in sorted(losses.items(), key=lambda item: item[1]):
        if not label.startswith("draw"):
            print(f"| {label} | {loss:.4f} | {loss - mean:+.4f} | {(loss - mean) / spread:+.1f} |")
    print(f"| random, mean of {len(draws)} | {mean:.4f} | ± {spread:.4f} | {min(draws):.4f} to {max(draws):.4f} |")


def _write_predicted(grid: Grid, bed: str, worth: dict[str, float]) -> None:
    """Write plans of the best and the worst set, and the benchmark that trains them."""
    row = next(row for row in grid.rows if row.label.startswith("draw"))
    with TemporaryDirectory() as scratch:
        recipe = read_recipe(words=option_words(row.options), output_dir=scratch)
        model = prepare(recipe, measured=False).trainer.model
    lora = replace(model.peft_config["default"], target_modules=None)
    base = model.unload()
    sites = find_sites(base, lora).sites
    limits: dict[str, Any] = read_limits(row.options)
    budget = site_budget(sites, lora, Limits(**limits))
    rows: dict[str, dict[str, str]] = {}
    for label, sign in (("predicted_best", 1.0), ("predicted_worst", -1.0)):
        # By what a parameter is worth: a set of small sites may be worth more than one large site.
        sizes = [sign * worth.get(s.name, 0.0) / cost for s, cost in zip(sites, budget.costs, strict=True)]
        names = [sites[i].name for i in budget.choose(sizes)]
        path = grid.output_dir / f"{label}.json"
        make_plan(sites, lora, names, rule="predicted").save(path)
        rows[label] = {"method": "selected", "plan": str(path), **{name: row.options[name] for name in limits}}
        print(f"{label}: {', '.join(names)}")
    content = {
        "methods": rows,
        "learning_rates": [choice["learning_rate"] for choice in row.choices],
        "seeds": list(grid.seeds),
    }
    write_text(predictions(grid), yaml.safe_dump({**known_predictions(grid), bed: content}, sort_keys=False))


if __name__ == "__main__":
    main()
