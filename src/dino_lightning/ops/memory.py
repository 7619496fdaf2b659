"""Memory of a process on a CPU. Imports nothing of PyTorch, which reads its settings once."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt`."""

KEPT_BYTES = 1 << 30


def use_huge_pages() -> None:
    """Let PyTorch ask Linux for pages of 2 MB for large tensors, unless the user has decided.

    The system clears each new page at its first use, and for 4 kB ones that takes longer than most operators do with
    them. Only before PyTorch's first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors of this process.

    For large tensors glibc asks the system each time and gives the memory back at once. For loader processes only:
    the tensors of training have many sizes and would leave gaps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
