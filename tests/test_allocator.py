"""Freed memory stays with the process once the allocator was told so, and does not otherwise."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os
from weightlora.allocator import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if {keep}:
    keep_freed_memory()
before = resident()
for _ in range(3):  # glibc raises its thresholds to the size of what it sees freed
    blocks = [b"x" * 2**20 for _ in range(64)]
    del blocks
print((resident() - before) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc alone")
@pytest.mark.parametrize(
    ("keep", "environment", "kept"),
    [(True, {}, True), (False, {}, False), (True, {"MALLOC_TRIM_THRESHOLD_": "131072"}, False)],
)
def test_64_freed_mebibytes(keep, environment, kept):
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(keep=keep)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (float(ran.stdout) >= 60) == kept
    assert kept or float(ran.stdout) < 8
