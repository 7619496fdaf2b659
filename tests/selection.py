"""Parameters of which the first ones are tried in every run of the tests, and the others with `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], *, fast: int = 1) -> list[Any]:
    """The values for `parametrize`; all but `fast` of them are marked as slow."""
    values = list(values)
    return [*values[:fast], *(pytest.param(value, marks=pytest.mark.slow) for value in values[fast:])]
