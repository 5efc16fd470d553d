"""Where the runs of a benchmark run: processes of this machine, or a Ray cluster. Records come as they are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

from weightlora.bench._job import LOG, Job, die_with_parent, failure, run_job
from weightlora.errors import OptionError, OutputError

Run = Callable[[Job], dict[str, Any]]
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
        pool = ProcessPoolExecutor(crowd, mp_context=get_context("spawn"), initializer=die_with_parent)
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
