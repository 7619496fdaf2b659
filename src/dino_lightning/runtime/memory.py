"""Memory of a process on a CPU."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt`."""

KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors of this process.

    For large tensors glibc asks the system each time and gives the memory back at once. The system clears each page
    before it hands it out, which takes longer than most operators do with it. Not where large tensors
    of many sizes come and go: the gaps between them grow from step to step before glibc 2.38.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
