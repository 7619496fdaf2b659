"""Allowed values of a key, declared with its type: `lr: Annotated[float, AtLeast(0)] = 0.0005`.

`config.constraints.check_values` enforces them, also in the configuration of a method of your own, and
`docs/configuration.md` lists them. null always passes: the type says whether it is allowed.
"""

import math
from collections.abc import Callable
from typing import Any

from dino_lightning.config.dotted import format_value
from dino_lightning.config.duration import Duration as Length
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError, did_you_mean


class Range:
    """Values for which `contains` is true; `expected` describes them in error messages and in the documentation."""

    def __init__(self, expected: str, contains: Callable[[Any], bool]) -> None:
        self.expected = expected
        self.contains = contains

    def check(self, key: str, value: Any) -> None:
        """Raise `UserError` if `value` is not allowed for `key`."""
        try:
            allowed = self.contains(value)
        except (TypeError, OverflowError):  # such as a list in a list of numbers
            allowed = False
        if not allowed:
            raise UserError(f"{key}={format_value(value)}: expected {self.expected}.")


class AtLeast(Range):
    """A finite number of at least `low`."""

    def __init__(self, low: float) -> None:
        super().__init__(f"at least {low}", lambda value: math.isfinite(value) and value >= low)


class Pair(Range):
    """Two numbers above 0, the smaller first."""

    def __init__(self, high: float, *, of: str = "numbers") -> None:
        expected = f"two {of} above 0 and up to {high:g}, the smaller first"
        super().__init__(expected, lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= high)


class OneOf(Range):
    """One of a few values; the error message names the closest one."""

    def __init__(self, *values: str | int | bool) -> None:
        super().__init__(", ".join(map(format_value, values)), lambda value: value in values or str(value) in values)
        self.values = values

    def check(self, key: str, value: Any) -> None:
        """Raise `UserError` with the closest value if `value` is none of them."""
        if isinstance(value, list | dict) or not self.contains(value):
            raise UserError(f"{key}={format_value(value)}: {did_you_mean(format_value(value), self._names())}")

    def _names(self) -> list[str]:
        return [format_value(value) for value in self.values]


class _Duration(Range):
    def check(self, key: str, value: Any) -> None:
        Length.parse(value, key=key)


class _FilePath(Range):
    def check(self, key: str, value: Any) -> None:
        usable_path(key, value)


def each(contains: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The condition that a list is not empty and `contains` is true for each value."""
    return lambda values: bool(values) and all(map(contains, values))


Duration = _Duration("a duration: `10ep`, `500it` or `10%`", lambda value: True)
FilePath = _FilePath("a path", lambda value: True)
Positive = Range("a positive number", lambda value: math.isfinite(value) and value > 0)
Share = Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
ShareBelowOne = Range("a number from 0 up to but not including 1", lambda value: 0 <= value < 1)
Seed = Range("an integer from 0 to 4294967295", lambda value: 0 <= value < 2**32)

Counts = Range("one or more numbers of at least 1", each(lambda value: value >= 1))
Positives = Range("one or more positive numbers", each(lambda value: value > 0))
Shares = Range("one or more numbers above 0 and up to 1", each(lambda value: 0 < value <= 1))
NotEmpty = Range("one or more values", bool)
