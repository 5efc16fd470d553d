"""Runs of a benchmark in processes of their own, here or on Ray: options → trained adapter → a record.

joblib does not serve here: its ``ray`` backend returns all records at the end, and its workers outlive a killed parent.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass
from logging import ERROR, LogRecord, getLogger
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from weightlora.bench.records import provenance
from weightlora.errors import OptionError, OutputError
from weightlora.fast.allocator import keep_freed_memory

COST_FILE = "cost.json"
#: Entry of a failed run's record: what it printed, and the traceback.
LOG = "log"
_LOG_SIZE = 100_000


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    options: Mapping[str, Any]
    """Of ``weightlora train``."""
    folder: Path
    """The run's own folder; what an interrupted run left there is taken up, and nothing is left in the end."""
    timing_rounds: int
    threads: int


Run = Callable[[Job], dict[str, Any]]


def run_job(job: Job) -> dict[str, Any]:
    """Return the record of a run; a run that fails is a record with ``status: failed``, the reason and the log.

    Raises:
        OutputError: The disk is full, or the run's folder cannot be written: nothing that the run itself did.
    """
    return guarded(job, _results)


def guarded(job: Job, work: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns as a record; see :func:`run_job`."""
    import torch

    start = time.perf_counter()
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    _quiet()
    said = io.StringIO()  # a trainer without bars prints its logs
    try:
        with redirect_stdout(said):
            outcome = {"status": "ok", **work(job)}
        outcome["run_seconds"] = round(time.perf_counter() - start, 2)
    except OutputError:
        raise
    except Exception as error:  # a broken run must not stop the others
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        outcome = {**failure(reason), LOG: said.getvalue()[-_LOG_SIZE:] + traceback.format_exc()}
    return {"options": dict(job.options), **outcome, "provenance": provenance()}


def failure(reason: str) -> dict[str, Any]:
    """Return the part of a record that says that its run failed."""
    return {"status": "failed", "error": reason}


_DIED = "the worker died, as one does that is killed for want of memory"


def run_here(jobs: Sequence[Job], workers: int, run: Run = run_job) -> Iterator[dict[str, Any]]:
    """Run jobs in parallel processes; one that kills its process is a record too.

    Args:
        jobs: They are begun in this order.
        workers: Processes.
        run: What each is given to.

    Raises:
        OutputError: See :func:`run_job`; the others are ended, and go on when they are begun again.
    """
    left, crowd = list(jobs), workers
    while left:
        others, stopped = set(active_children()), True
        pool = ProcessPoolExecutor(crowd, mp_context=get_context("spawn"), initializer=_die_with_parent)
        try:
            futures = {pool.submit(run, job): job for job in left}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield future.result()
                    left.remove(futures[future])
            stopped = False
        finally:
            pool.shutdown(wait=not stopped, cancel_futures=True)
            if stopped:  # by Ctrl-C, or because no more records are wanted: unfinished runs are ended
                for process in set(active_children()) - others:
                    process.terminate()
        if left and crowd == 1:  # alone, they run in their order, and one knows who it was
            job = left.pop(0)
            yield {"options": dict(job.options), **failure(_DIED)}
        crowd = workers if crowd == 1 else 1


def run_on_ray(
    jobs: Sequence[Job], *, gpus: float, new_processes: bool, run: Run = run_job
) -> Iterator[dict[str, Any]]:
    """Run jobs on the Ray cluster that :func:`ray_slots` found.

    Args:
        jobs: They are begun in this order; each takes as many CPUs as the first has threads.
        gpus: GPUs of each; two runs of 0.5 share one.
        new_processes: Each job has a process of its own.
        run: What each is given to.

    Raises:
        OutputError: See :func:`run_job`.
    """
    import ray
    from ray.exceptions import RayError

    resources: Any = {"num_cpus": jobs[0].threads, "num_gpus": gpus, "max_calls": int(new_processes)}
    remote: Any = ray.remote(**resources)(run)
    pending = {remote.remote(job): job for job in jobs}
    while pending:
        [done], _ = ray.wait(list(pending), num_returns=1)
        job = pending.pop(done)
        try:
            yield ray.get(done)
        except OutputError as error:  # Ray's own subclass, with the remote traceback as its text
            cause: Any = error
            raise cause.cause from None
        except RayError as error:
            reason = next(iter(str(error).splitlines()), _DIED)
            yield {"options": dict(job.options), **failure(f"{type(error).__name__}: {reason}"), LOG: str(error)}


def ray_slots(threads: int, gpus: float) -> int:
    """Return how many runs fit at once on the cluster that ``RAY_ADDRESS`` names, else on this machine's own.

    Args:
        threads: CPUs of each run.
        gpus: GPUs of each run.

    Raises:
        OptionError: Ray is not installed, or no node has the resources of a run.
    """
    try:
        import ray
    except ImportError as error:
        raise OptionError("--ray needs Ray; run: pip install 'weightlora[ray]'") from error
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    found: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(_slots(node.get("CPU", 0), node.get("GPU", 0), threads, gpus) for node in found)
    if not slots:
        most = {kind: max(node.get(kind, 0) for node in found) for kind in ("CPU", "GPU")}
        raise OptionError(
            f"a run takes {threads} CPUs and {gpus:g} GPUs, but the nodes of the Ray cluster have at most "
            f"{most['CPU']:g} and {most['GPU']:g}; lower OMP_NUM_THREADS or --gpus_per_run"
        )
    return slots


def _slots(cpus: float, devices: float, threads: int, gpus: float) -> int:
    """Runs at once on a node; a run does not take parts of two GPUs."""
    if not gpus:
        return int(cpus // threads)
    on_gpus = devices // gpus if gpus >= 1 else devices * (1 // gpus)
    return int(min(cpus // threads, on_gpus))


def _die_with_parent() -> None:
    """End this process when the one that started it ends: a killed benchmark leaves no worker behind."""
    parent = parent_process()
    assert parent is not None, "a worker is started by multiprocessing"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _results(job: Job) -> dict[str, Any]:
    from weightlora.cost.step_time import Peak, StepCost
    from weightlora.runs.files import ADAPTER, RESULTS_FILE
    from weightlora.runs.recipe import option_words, read_recipe
    from weightlora.runs.train import train

    cost_path = job.folder / COST_FILE
    if (job.folder / RESULTS_FILE).exists() and not (cost_path.exists() and (job.folder / ADAPTER).exists()):
        # Its training went on from its very end, where no step is left to be measured; or its adapter was moved to
        # where it is kept, and its record was not written.
        shutil.rmtree(job.folder)
    recipe = read_recipe(words=[*option_words(job.options), "--output_dir", str(job.folder)])
    peak = Peak()
    with peak.watched():
        results = train(recipe, callbacks=[StepCost(cost_path, job.timing_rounds, peak)])
    cost = json.loads(cost_path.read_text(encoding="utf-8"))
    training = round(results["training_seconds"] - cost.pop("measuring_seconds"), 2)
    return {**{k: v for k, v in results.items() if k not in _LEFT_OUT}, "training_seconds": training, **cost}


#: Of a run's results: in the options already, or too long.
_LEFT_OUT = {"before", "losses", "method", "per_device_train_batch_size", "gradient_accumulation_steps"}


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"weightlora: warning: {message}\n"


def _says_no_kernel(record: LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


def _quiet() -> None:
    from datasets import disable_progress_bars
    from transformers.utils import logging as reports

    reports.set_verbosity_error()
    reports.disable_progress_bar()
    disable_progress_bars()
    getLogger("weightlora").setLevel(ERROR)  # what scoring costs is in the record
    warnings.formatwarning = _one_line  # this process runs the job alone
    warnings.filterwarnings("ignore", category=FutureWarning)
    getLogger("bitsandbytes.backends.cpu.ops").addFilter(_says_no_kernel)  # see cli/_quiet.py
