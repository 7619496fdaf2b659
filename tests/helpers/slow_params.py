"""Parameters of which only the first ones run by default; the others need `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], *, fast: int = 1) -> list[Any]:
    """Values (tuples for several parameters) for `parametrize`; all except the first `fast` are marked as slow."""
    values = list(values)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=[pytest.mark.slow] if i >= fast else []) for i, row in enumerate(rows)]
