"""How many examples a property is tried on: few by default, many with `-m slow`."""

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
    """A test's argument `examples`: hypothesis' settings for few examples, and for many in the slow suite."""
    slow = settings(max_examples=many, **COMMON)
    return pytest.mark.parametrize(
        "examples",
        [
            pytest.param(settings(max_examples=few, **COMMON), id="few"),
            pytest.param(slow, id="many", marks=pytest.mark.slow),
        ],
    )


def check(holds: Callable[..., None], given: Callable[..., Any], examples: settings) -> None:
    """Try a property on as many examples as `examples` says."""
    examples(given(holds))()
