"""A sweep as points: what each run was set to, what it came to, and an axis for each setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from dino_lightning.errors import UserError
from dino_lightning.report.runs import format_setting
from dino_lightning.report.svg import log_ticks, ticks
from dino_lightning.report.sweeps.jobs import Job, display_name, swept_keys

LOG_FACTOR = 8
"""A positive quantity whose maximum is at least this many times its minimum gets a logarithmic axis."""
MAX_CATEGORIES = 8
"""Maximum number of values that a map of two keys shows as categories."""


@dataclass(frozen=True)
class Point:
    """One run."""

    name: str
    """Name of its folder."""
    values: dict[str, Any]
    """Swept key -> value."""
    knn: float | None
    """k-NN top-1 in percent: the final one, or the latest so far."""
    state: str
    """See `Job.state`."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep."""

    keys: list[str]
    points: list[Point]
    untrained: float | None
    """Mean k-NN top-1 of the untrained networks, in percent."""

    @property
    def best(self) -> Point | None:
        """The finished run with the highest k-NN accuracy or, while none has finished, the best of all."""
        known = [point for point in self.points if point.knn is not None and point.state != "failed"]
        finished = [point for point in known if point.state == "finished"]
        return max(finished or known, key=lambda point: point.knn or 0.0, default=None)


@dataclass(frozen=True)
class Axis:
    """Positions of the values of a key, from 0 to 1 along the axis."""

    names: dict[Any, float]
    """Value -> position of a category; empty for a numeric scale."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    @property
    def numbers(self) -> bool:
        """Whether all categories are numbers, so that a curve may connect them."""
        return all(isinstance(value, int | float) for value in self.names)

    def position(self, value: Any) -> float:
        """Position of a value, from 0 to 1."""
        if self.names:
            return self.names[value]
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, float(value)))
        return (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels of the ticks."""
        if self.names:
            return [(position, format_setting(value)) for value, position in self.names.items()]
        numbers = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count=4)
        return [(self.position(number), f"{number:.4g}") for number in numbers]


def sweep_of(jobs: Sequence[Job]) -> Sweep:
    """The runs as points. Raises `UserError` if they do not differ in any setting."""
    jobs = list(jobs)
    keys = swept_keys(jobs)
    if len({job.run.title for job in jobs}) > 1:
        keys = ["experiment", *keys] if all(job.overrides for job in jobs) else ["experiment"]
    if not keys and len({job.seed for job in jobs}) > 1:
        keys = ["seed"]
    if not keys:
        raise UserError("plot: these runs do not differ in any setting.")
    untrained = [value for job in jobs if (value := job.run.number("knn_top1_untrained")) is not None]
    points = [Point(job.run.name, {key: _value(job, key) for key in keys}, job.run.knn, job.state) for job in jobs]
    return Sweep(keys, points, mean(untrained) if untrained else None)


def axis_of(values: Sequence[Any], *, few_as_names: bool = False) -> Axis:
    """A scale for numbers; categories for other values, for at most two values and, with `few_as_names`, for a few."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) for value in distinct):
        distinct.sort()
    numbers = [value for value in distinct if isinstance(value, int | float) and not isinstance(value, bool)]
    usable = len(numbers) == len(distinct) and all(map(math.isfinite, numbers))
    if not usable or len(distinct) <= (MAX_CATEGORIES if few_as_names else 2):
        return Axis({value: (index + 0.5) / len(distinct) for index, value in enumerate(distinct)})
    low, high = min(numbers), max(numbers)
    if low > 0 and high >= LOG_FACTOR * low:
        pad = (high / low) ** 0.06
        return Axis({}, low / pad, high * pad, log=True)
    pad = (high - low) * 0.06
    return Axis({}, low - pad, high + pad)


def _value(job: Job, key: str) -> Any:
    if key == "experiment":
        return display_name(job.row)
    value = job.value(key)
    return value if isinstance(value, int | float | str) else str(value)
