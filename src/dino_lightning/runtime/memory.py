"""Memory allocation on a CPU."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt`."""

KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors of this process.

    glibc requests the memory of each large tensor from the system and returns it when the tensor is freed. The system
    clears each new page, which takes longer than most operators need for it. Do not use this if large tensors of many
    different sizes are allocated: before glibc 2.38, the fragmentation grows with each step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
