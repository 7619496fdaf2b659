"""The number of examples for a property: few by default, many with `-m slow`."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
}


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrizes the argument `examples` of a test: Hypothesis settings with few examples, and with many (slow)."""
    slow = settings(max_examples=many, **COMMON)
    return pytest.mark.parametrize(
        "examples",
        [
            pytest.param(settings(max_examples=few, **COMMON), id="few"),
            pytest.param(slow, id="many", marks=pytest.mark.slow),
        ],
    )


def check(holds: Callable[..., None], given: Callable[..., Any], examples: settings) -> None:
    """Check a property with the number of examples in `examples`."""
    examples(given(holds))()
