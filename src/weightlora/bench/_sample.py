"""A run of a benchmark that stops after a few steps: what the whole run would take."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from weightlora.bench._job import COST_FILE, Job, guarded

if TYPE_CHECKING:
    from transformers import Trainer

    from weightlora.runs.train import Run
    from weightlora.tasks.base import Prepared

#: Batches of each split that are measured.
_BATCHES = 4
#: An evaluation of so many seconds is timed once; a shorter one again, without the imports of the first.
_LONG = 10.0


def sample_job(job: Job) -> dict[str, Any]:
    """Return a record of what the job's run would take: ``seconds``, ``start_seconds``, ``steps``, ``peak_bytes``.

    Loading, selection and the timing of steps are done whole. Training and evaluation take a few batches, and their
    time is extrapolated. Nothing is left behind.

    Raises:
        OutputError: The folder of temporary files cannot be written.
    """
    return guarded(job, _sampled)


@dataclass(frozen=True)
class _Parts:
    """Seconds of the parts of a whole run."""

    selection: float
    training: float
    evaluation: float
    saving: float


def _sampled(job: Job) -> dict[str, Any]:
    from weightlora.cost.saved_bytes import now

    began = time.time()
    start = now()
    with TemporaryDirectory(prefix="weightlora-") as folder:
        run, watch = _loaded(job, Path(folder), few=True)
        first_load = now() - start
        parts = _parts(run, watch)
        peak = peak_bytes()
        del run
        gc.collect()
        start = now()
        _loaded(job, Path(folder), few=False)  # as all but the first run of a process
        load = now() - start
    seconds = load + parts.selection + parts.training + parts.evaluation + parts.saving
    return {
        "seconds": seconds,
        "began": began,
        "imports": max(0.0, first_load - load),
        "steps": watch.planned,
        "peak_bytes": peak,
    }


def _loaded(job: Job, folder: Path, *, few: bool) -> tuple[Run, Any]:
    """The run, with a few rows to measure or all, and what stops it."""
    from weightlora.bench._few_steps import FewSteps
    from weightlora.bench.step_cost import Peak, StepCost
    from weightlora.runs.recipe import option_words, read_recipe
    from weightlora.runs.train import prepare

    recipe = read_recipe(words=[*option_words(job.options), "--output_dir", str(folder)])
    rows = _BATCHES * recipe.training.per_device_eval_batch_size
    watch = FewSteps()
    callbacks = [watch, StepCost(folder / COST_FILE, job.timing_rounds, Peak())]
    return prepare(recipe, callbacks, few=rows if few else None), watch


def _parts(run: Run, watch: Any) -> _Parts:
    from weightlora.cost.saved_bytes import now
    from weightlora.methods import entry_of
    from weightlora.runs.train import export, fit, plan

    start = now()
    method = plan(run)
    planned = now()
    fit(run, method)
    fitted = now()
    measure = _Measure(run.task)
    if entry_of(run.recipe.method.method).trains == "ranks":  # what changes ranks refuses to be saved before its end
        measure(run.trainer)
    else:
        export(replace(run, task=replace(run.task, measure=measure)), method, before=None)
    saving = now() - fitted - measure.spent
    evaluations = 2 if run.recipe.training.eval_on_start else 1
    evaluation = evaluations * measure.seconds * _times_more(run)
    training = fitted - planned + (watch.planned - watch.taken) * watch.step_seconds
    return _Parts(planned - start, training, evaluation, saving)


class _Measure:
    """A task's measure that is timed."""

    def __init__(self, task: Prepared) -> None:
        self._task = task
        self.spent = 0.0
        """Seconds of all calls of the task's measure."""
        self.seconds = 0.0
        """Of the last one."""

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        from weightlora.cost.saved_bytes import now

        found: dict[str, float] = {}
        for _ in range(2):
            start = now()
            found = self._task.measure(trainer)
            self.seconds = now() - start
            self.spent += self.seconds
            if self.seconds > _LONG:
                break
        return found


def _times_more(run: Run) -> float:
    """How many times the measured rows all of them are."""
    few = _BATCHES * run.recipe.training.per_device_eval_batch_size
    whole: Mapping[str, int] = {split: count for split, count in run.rows.items() if split != "train"}
    return sum(whole.values()) / max(1, sum(min(few, count) for count in whole.values()))


def peak_bytes() -> int:
    """Return the most memory that this process has had: of the GPU where it uses one; 0 where it is not known."""
    import torch

    on_gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    if on_gpu or sys.platform == "win32":
        return on_gpu
    status = Path("/proc/self/status")  # Linux's ru_maxrss is never below what the parent had when it began a process
    if status.exists():
        found = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
        return int(found[0].split()[1]) * 1024 if found else 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
