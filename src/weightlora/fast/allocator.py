"""Make glibc keep freed memory, so that each training step reuses the memory of the last one."""

from __future__ import annotations

import ctypes
import os
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Tell glibc, for this process, not to return freed memory to the system.

    By default glibc may return, at the end of a backward pass, all memory that the forward pass saved. The next step
    then requests it again, page by page. With this call the process stays as large as it was at its largest. Other C
    libraries and settings in the environment are left unchanged.

    Example:
        >>> keep_freed_memory()
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _ENVIRONMENT):
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Larger blocks are never kept, and a language model's logits are large. Older glibc allows 32 MiB at most.
    if not mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
