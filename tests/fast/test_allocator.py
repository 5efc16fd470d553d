"""Freed memory stays with the process once the allocator was told so, and does not otherwise."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os
from pathlib import Path

from weightlora.fast.allocator import keep_freed_memory
from weightlora.bench._workers import Job, run_job
from weightlora.cli import main

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

{call}
before = resident()
for _ in range(3):  # glibc raises its thresholds to the size of what it sees freed
    blocks = [b"x" * (2**26 // {count}) for _ in range({count})]
    del blocks
print((resident() - before) / 2**20)
"""


def takes_more_than_32_mebibytes():
    """Older glibc does not; asked of this process, whose thresholds matter to no test."""
    return bool(ctypes.CDLL(None).mallopt(-3, 2**31 - 1))


@pytest.mark.sampled(1)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc alone")
@pytest.mark.parametrize("count", [64, 1])
@pytest.mark.parametrize(
    ("call", "environment", "kept"),
    [
        ("pass", {}, False),
        ("keep_freed_memory()", {}, True),
        ("keep_freed_memory()", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ("main(['methods'])", {}, True),
        ("run_job(Job({'method': 'none such'}, Path('nowhere'), timing_rounds=1, threads=1))", {}, True),
    ],
)
def test_64_freed_mebibytes(call, environment, kept, count):
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(call=call, count=count)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    mebibytes = float(ran.stdout.splitlines()[-1])
    assert mebibytes >= 60 if kept and (count > 1 or takes_more_than_32_mebibytes()) else mebibytes < 8
