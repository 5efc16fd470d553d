"""What experiment trackers are told of a plan, once: its numbers, and the plan itself where they keep files.

The trackers are those of the trainer's ``report_to``, as it has set them up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, WandbCallback

from weightlora.text import in_markdown

if TYPE_CHECKING:
    from transformers import Trainer

    from weightlora.plan.plan import AdapterPlan

_TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


def plan_numbers(plan: AdapterPlan) -> dict[str, float]:
    """Return the numbers of a plan, by the names that a tracker shows.

    Example:
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import AdapterPlan, PlannedSite
        >>> sites = [PlannedSite(Site(name, 8, 8), 4, 8, r=r, alpha=8, score=1.0) for name, r in (("a", 4), ("b", 0))]
        >>> plan_numbers(AdapterPlan(tuple(sites)))
        {'plan/kept': 1, 'plan/sites': 2, 'plan/parameters': 64, 'plan/share_of_lora': 0.5}
    """
    return {
        "plan/kept": len(plan.names),
        "plan/sites": len(plan.entries),
        "plan/parameters": plan.parameters,
        "plan/share_of_lora": plan.parameters / plan.lora_parameters,
    }


def report_plan(trainer: Trainer, plan: AdapterPlan, path: Path) -> None:
    """Tell the trainer's trackers of ``plan``; without trackers nothing is logged.

    Args:
        trainer: One whose training begins.
        plan: The adapters that it trains.
        path: The plan's file.
    """
    trackers = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, _TRACKERS)]
    if not trackers:
        return
    trainer.log(plan_numbers(plan))
    if not trainer.is_world_process_zero():
        return
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            tracker.tb_writer.add_text("plan", _table(plan))
        elif isinstance(tracker, WandbCallback):
            _keep_file(path)


def _keep_file(path: Path) -> None:
    """Store the plan as an artefact of the current W&B run."""
    import wandb

    run: Any = wandb.run
    if run is not None and path.exists():
        run.log_artifact(str(path), name=f"plan-{run.id}", type="plan")


def _table(plan: AdapterPlan) -> str:
    """Site, rank and score, as Markdown."""
    rows = [f"| {in_markdown(e.site.name)} | {e.r} | {e.score:.4g} |" for e in plan.entries]
    return "\n".join(["| site | rank | score |", "| --- | --- | --- |", *rows])
