"""One run of a benchmark in a process of its own: options → trained adapter and its numbers → a record."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from logging import ERROR, getLogger
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from weightlora.bench.records import provenance
from weightlora.errors import OutputError
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


def die_with_parent() -> None:
    """End this process when the one that started it ends: a killed benchmark leaves no worker behind."""
    parent = parent_process()
    assert parent is not None, "a worker is started by multiprocessing"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _results(job: Job) -> dict[str, Any]:
    from weightlora.bench.step_cost import Peak, StepCost
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


def _says_no_kernel(record: logging.LogRecord) -> bool:
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
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_says_no_kernel)  # see cli/_quiet.py
