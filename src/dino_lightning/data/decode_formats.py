"""Safe readers of NumPy and TIFF files that may be damaged or malicious."""

import io
import math

import numpy as np

NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Header readers by format version; version 3 is only for Unicode field names, which images do not have."""
MAX_TIFF_PAGES = 10_000
"""A TIFF with more pages is damaged, or not an image."""


def read_npy(content: bytes) -> np.ndarray:
    """The array of a `.npy` file, without unpickling. Raises `ValueError` for an invalid file."""
    file = io.BytesIO(content)
    try:
        shape, _, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # the header is Python code, whose parser also raises MemoryError, for example
        reason = " ".join(str(error).split())
        raise ValueError(f"not the header of an array ({type(error).__name__}: {reason})") from error
    # NumPy would allocate the memory for the shape before it checks whether the file contains the values.
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > len(content) - file.tell():
        raise ValueError(f"an array of shape {shape} of {dtype} is longer than the file")
    return np.load(io.BytesIO(content), allow_pickle=False)


def check_tiff_pages(content: bytes) -> None:
    """Raise `ValueError` if the pages of a TIFF form a loop, which a library would follow forever, or are too many.

    A page is a directory: the number of its entries, the entries, and the offset of the next directory.
    """
    order = "little" if content.startswith(b"II") else "big"
    is_bigtiff = content[2:4] in (b"+\0", b"\0+")  # with 64-bit offsets
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_bigtiff else (2, 12, 4)

    def integer(start: int, length: int) -> int:
        return int.from_bytes(content[start : start + length], order)

    visited: set[int] = set()
    page = integer(8 if is_bigtiff else 4, offset_bytes)
    while 0 < page < len(content):
        if page in visited:
            raise ValueError("its pages form a loop")
        if len(visited) == MAX_TIFF_PAGES:
            raise ValueError(f"more than {MAX_TIFF_PAGES} pages")
        visited.add(page)
        page = integer(page + count_bytes + integer(page, count_bytes) * entry_bytes, offset_bytes)
