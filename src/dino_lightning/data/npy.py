"""Arrays in NumPy's file format, of files that may be damaged or made to do harm."""

import io
import math

import numpy as np

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Readers of the versions of the format; a third one is for names in Unicode, which images do not have."""


def read_npy(content: bytes) -> np.ndarray:
    """The array of a file `.npy`, without unpickling. Raises `ValueError` for whatever is wrong with it."""
    file = io.BytesIO(content)
    try:
        shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # a header is Python text: its parser has errors of its own, MemoryError among them
        reason = " ".join(str(error).split())
        raise ValueError(f"not the header of an array ({type(error).__name__}: {reason})") from error
    # NumPy takes the memory that a header asks for before it looks whether the values are there.
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > len(content) - file.tell():
        raise ValueError(f"an array of shape {shape} of {dtype} is longer than the file")
    return np.load(io.BytesIO(content), allow_pickle=False)
