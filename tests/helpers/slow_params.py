"""Parameters of which the first ones are tried in every run of the tests, and the others with `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], *, fast: int = 1) -> list[Any]:
    """The values (a tuple for several parameters) for `parametrize`; all but `fast` of them are marked as slow."""
    values = list(values)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=[pytest.mark.slow] if place >= fast else []) for place, row in enumerate(rows)]
