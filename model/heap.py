"""Where large blocks of memory go when they are freed."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let blocks of any size that are freed stay with the process, for the next that is as large.

    glibc gives large ones back to the kernel, which clears every page before it hands it out again: a training step on
    a CPU, all of whose tensors are large and come back in the next, spent a fifth of its time on that. Of the whole
    process; memory that is held grows to its peak and stays there. False where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
