"""What glibc does with memory that was freed: by itself it hands large blocks back, and gets every page anew.

A network on a CPU frees and takes hundreds of megabytes per batch; clearing their pages again was a third of the time
of ResNet-50 at 512 px, and more beside a second thread, since the kernel serves one thread of a process at a time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

ENVIRONMENT: Final = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1, "MALLOC_ARENA_MAX": 1}
"""Environment variables (mallopt(3)) for a process that is still to be started, in bytes and arenas.

One arena, since large blocks of others come from the system whatever the threshold.
"""

_MALLOPT: Final = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_ARENA_MAX": -8}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to 2 GiB; call it before threads are started.

    For programs, not for libraries: it changes the whole process. Variables that the user has set stay as they are.
    Returns False where there is no glibc: nothing is changed there.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return all(mallopt(_MALLOPT[name], value) for name, value in ENVIRONMENT.items() if name not in os.environ)
