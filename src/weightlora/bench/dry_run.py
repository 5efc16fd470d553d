"""What a benchmark will cost: a few steps of each kind of run are timed, and nothing is recorded."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightlora.bench._workers import COST_FILE, Job, guarded
from weightlora.bench.engine import HERE, Where, final, makespan, recorded, row_key
from weightlora.bench.grid import Grid, Point
from weightlora.cost.saved_bytes import now
from weightlora.cost.step_time import Peak, StepCost
from weightlora.methods import entry_of
from weightlora.runs.recipe import option_words, read_recipe
from weightlora.runs.train import Run, export, fit, plan, prepare
from weightlora.tasks.base import PreparedTask

#: Batches of each split that are measured.
_BATCHES = 4
#: An evaluation of so many seconds is timed once; a shorter one again, without the imports of the first.
_LONG = 10.0
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """Runs that differ only in seed and learning rate, and so cost the same."""

    label: str
    """The row of the table."""
    task: str
    runs: int
    """How many have no record."""
    steps: int
    """Optimizer steps of one run."""
    seconds: float
    """Of one run, from its start to its record."""
    peak_bytes: int
    """Most memory of its process, on the GPU where there is one; 0 where it is not known."""
    error: str = ""
    """Why it could not be timed; the other numbers are 0 then."""


@dataclass(frozen=True)
class DryRun:
    """What the runs of a benchmark that have no record will cost."""

    kinds: tuple[Kind, ...]
    recorded: int
    """Runs that have a record."""
    slots: int
    """Runs at once."""
    seconds: float
    """Until the last run ends; those that could not be timed are left out."""

    @property
    def runs(self) -> int:
        """How many have no record."""
        return sum(kind.runs for kind in self.kinds)

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs."""
        return sum(kind.runs * kind.steps for kind in self.kinds)

    @property
    def peak_bytes(self) -> int:
        """Most memory of all runs at once, each of the largest kind."""
        at_once = min(self.slots, self.runs)
        return at_once * max((kind.peak_bytes for kind in self.kinds), default=0)


def dry_run(
    grid: Grid,
    *,
    where: Where = HERE,
    retry: bool = False,
    report: Callable[[Point, int, int], None],
) -> DryRun:
    """Return what the runs without a record will cost, from one short run of each kind.

    As many short runs are timed at once as there will be runs at once, since they slow each other.

    Args:
        grid: The benchmark; nothing is written to its folder.
        where: Where it will run.
        retry: Whether failed runs will be run again.
        report: ``report(point, done, wanted)`` is called after each short run.

    Raises:
        OptionError: Ray is not installed, or the cluster lacks the resources of a run.
    """
    known = final(recorded(grid), retry=retry)
    phases = grid.left(known)
    done = {point.key for point in (*grid.tuning, *grid.tested(known)) if point.key in known}
    tuned = grid.tuned
    runs = Counter(_kind(point, tuned) for phase in phases for point in phase)
    if not runs:
        return DryRun((), len(done), where.workers, 0.0)
    slots = where.slots()
    points = {_kind(point, tuned): point for phase in phases for point in phase}
    jobs = _filled([Job(p.options, Path(), grid.timing_rounds, where.threads) for p in points.values()], slots)
    samples: dict[str, list[Sample]] = {kind: [] for kind in points}
    for number, sample in enumerate(_samples(jobs, slots, where), 1):
        kind = row_key(sample["options"], tuned)
        samples[kind].append(sample)
        report(points[kind], number, len(jobs))
    kinds = {kind: _cost(points[kind], runs[kind], samples[kind]) for kind in points}
    starts = [sample["start_seconds"] for some in samples.values() for sample in some if sample["status"] == "ok"]
    start = statistics.mean(starts) if starts else 0.0
    per_run, per_phase = (start, 0.0) if where.new_process_per_run else (0.0, start)
    seconds = sum(
        per_phase + makespan((per_run + kinds[_kind(point, tuned)].seconds for point in phase), slots)
        for phase in phases
        if phase
    )
    return DryRun(tuple(kinds.values()), len(done), slots, seconds)


def _kind(point: Point, tuned: Collection[str]) -> str:
    return row_key(point.options, tuned)


def _filled(jobs: Sequence[Job], slots: int) -> list[Job]:
    """Each job once, and some again, so that all slots are busy all the time."""
    return list(islice(cycle(jobs), slots * math.ceil(len(jobs) / slots)))


def _samples(jobs: Sequence[Job], slots: int, where: Where) -> Iterator[Sample]:
    """Time each job in a process of its own, whose memory is that of this job alone; ``slots`` of them at once."""
    for first in range(0, len(jobs), slots):
        submitted = time.time()
        for sample in where.finished(jobs[first : first + slots], sample_job, new_processes=True):
            start = sample["began"] - submitted + sample["imports"] if sample["status"] == "ok" else 0.0
            yield {**sample, "start_seconds": max(0.0, start)}


def _cost(point: Point, runs: int, samples: Sequence[Sample]) -> Kind:
    """The means of a kind's short runs."""
    good = [sample for sample in samples if sample["status"] == "ok"]
    label, task = point.row.label, point.row.task
    if not good:
        return Kind(label, task, runs, 0, 0.0, 0, error=samples[0]["error"])
    seconds = statistics.mean(sample["seconds"] for sample in good)
    return Kind(label, task, runs, good[0]["steps"], seconds, max(sample["peak_bytes"] for sample in good))


def sample_job(job: Job) -> dict[str, Any]:
    """Return a record of what the job's run would take: ``seconds``, ``began``, ``imports``, ``steps``, ``peak_bytes``.

    Loading, selection and the timing of steps are done whole. Training and evaluation take a few batches, and their
    time is extrapolated. Nothing is left behind.

    Raises:
        OutputError: The folder of temporary files cannot be written.
    """
    return guarded(job, _sampled)


def _sampled(job: Job) -> dict[str, Any]:
    began, start = time.time(), now()
    with TemporaryDirectory(prefix="weightlora-") as folder:
        run, watch = _loaded(job, Path(folder), few=True)
        first_load = now() - start
        seconds = _seconds(run, watch)
        peak = peak_bytes()
        del run
        gc.collect()
        start = now()
        _loaded(job, Path(folder), few=False)  # as all but the first run of a process
        load = now() - start
    imports = max(0.0, first_load - load)
    return {"seconds": load + seconds, "began": began, "imports": imports, "steps": watch.planned, "peak_bytes": peak}


def _loaded(job: Job, folder: Path, *, few: bool) -> tuple[Run, FewSteps]:
    """The run, with a few rows to measure or all, and what stops it."""
    recipe = read_recipe(words=[*option_words(job.options), "--output_dir", str(folder)])
    rows = _BATCHES * recipe.training.per_device_eval_batch_size
    watch = FewSteps()
    callbacks = [watch, StepCost(folder / COST_FILE, job.timing_rounds, Peak())]
    return prepare(recipe, callbacks, few=rows if few else None), watch


def _seconds(run: Run, watch: FewSteps) -> float:
    """What selection, training, evaluation and saving of the whole run take."""
    start = now()
    method = plan(run)
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
    return fitted - start + (watch.planned - watch.taken) * watch.step_seconds + evaluation + saving


def _times_more(run: Run) -> float:
    """How many times the measured rows all of them are."""
    few = _BATCHES * run.recipe.training.per_device_eval_batch_size
    whole = [count for split, count in run.rows.items() if split != "train"]
    return sum(whole) / max(1, sum(min(few, count) for count in whole))


class _Measure:
    """A task's measure that is timed."""

    def __init__(self, task: PreparedTask) -> None:
        self._task = task
        self.spent = 0.0
        """Seconds of all calls of the task's measure."""
        self.seconds = 0.0
        """Of the last one."""

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        found: dict[str, float] = {}
        for _ in range(2):
            start = now()
            found = self._task.measure(trainer)
            self.seconds = now() - start
            self.spent += self.seconds
            if self.seconds > _LONG:
                break
        return found


class FewSteps(TrainerCallback):
    """Stops a training after twelve steps, or after four where they are slow, and knows how long one takes.

    The first two count as part of the start: memory is allocated and kernels are chosen then. A step that takes more
    than three times the median, such as one with a round of ALoRA's, is not multiplied.
    """

    _STEPS, _UNTIMED, _FEWEST, _SLOW, _UNUSUAL = 12, 2, 4, 30.0, 3

    def __init__(self) -> None:
        self.planned = 0
        """Steps of the whole training."""
        self._begin = 0.0
        self._ends: list[float] = []

    @property
    def taken(self) -> int:
        """Steps that were taken."""
        return len(self._ends)

    @property
    def step_seconds(self) -> float:
        """Mean time of a step with its batch, without the steps in which a method does what it seldom does."""
        lengths = [end - begin for begin, end in pairwise([self._begin, *self._ends])]
        lengths = lengths[self._UNTIMED :] or lengths
        most = self._UNUSUAL * statistics.median(lengths)
        return statistics.mean(length for length in lengths if length <= most)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.planned, self._begin, self._ends = state.max_steps, now(), []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time, and stop when there are enough."""
        self._ends.append(now())
        slow = self.taken >= self._FEWEST and self._ends[-1] - self._begin > self._SLOW
        if slow or self.taken >= self._STEPS:
            control.should_training_stop = True


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
