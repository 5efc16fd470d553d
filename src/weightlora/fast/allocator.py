"""The C library's allocator, told to keep freed memory: a training step takes back what the last one freed."""

from __future__ import annotations

import ctypes
import os
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Tell glibc, for this process, not to hand freed memory back to the system.

    By default it may hand back at the end of a backward pass all that the forward pass had saved, and the next step
    gets it again page by page; whether it does so hangs on what lies at the heap's end. The process then stays as large
    as it was at its largest. Other C libraries, and what the user has set in the environment, are left alone.

    Example:
        >>> keep_freed_memory()
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ENVIRONMENT):
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Blocks above this are never kept, and a language model's logits are large. Older glibc takes 32 MiB at most.
    if not mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
