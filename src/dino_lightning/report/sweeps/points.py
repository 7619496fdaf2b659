"""A sweep as points: what each run was set to, what it came to, and an axis for each setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from dino_lightning.errors import UserError
from dino_lightning.report.svg import log_ticks, ticks
from dino_lightning.report.sweeps.jobs import Job, format_setting, swept_keys
from dino_lightning.report.sweeps.published import PUBLISHED

STATES = ("finished", "pruned", "under way", "failed")
LOG_FACTOR = 8
"""A positive quantity whose largest value is this many times its smallest gets a logarithmic axis."""
MAX_CATEGORIES = 8
"""Most values of a key that stand beside each other as names, in a map of two keys."""


@dataclass(frozen=True)
class Point:
    """One run."""

    name: str
    """Of its folder."""
    values: dict[str, Any]
    """Swept key -> value."""
    knn: float | None
    """k-NN top-1 in percent, the run's or the latest."""
    state: str
    """One of `STATES`."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep."""

    keys: list[str]
    points: list[Point]
    untrained: float | None
    """Mean k-NN top-1 of the untrained networks, in percent."""

    @property
    def best(self) -> Point | None:
        """The run with the highest figure among those that have finished or, while there is none, among all."""
        known = [point for point in self.points if point.knn is not None and point.state != "failed"]
        finished = [point for point in known if point.state == "finished"]
        return max(finished or known, key=lambda point: point.knn or 0.0, default=None)


@dataclass(frozen=True)
class Axis:
    """Where the values of a key go, as shares of an axis from 0 to 1."""

    names: dict[Any, float]
    """Value -> place, where values stand beside each other as names; empty for a scale of numbers."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    @property
    def numbers(self) -> bool:
        """Whether there is a way from one value to the next."""
        return all(isinstance(value, int | float) for value in self.names)

    def position(self, value: Any) -> float:
        """Share of the axis."""
        if self.names:
            return self.names[value]
        low, high, here = (math.log(x) if self.log else x for x in (self.low, self.high, float(value)))
        return (here - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and what is written there."""
        if self.names:
            return [(place, format_setting(value)) for value, place in self.names.items()]
        numbers = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count=4)
        return [(self.position(number), f"{number:.4g}") for number in numbers]


def sweep_of(jobs: Sequence[Job]) -> Sweep:
    """The runs as points. Raises `UserError` where they differ in nothing that could be an axis."""
    jobs = list(jobs)
    keys = swept_keys(jobs)
    if len({job.experiment for job in jobs}) > 1:
        keys = ["experiment", *keys] if all(job.overrides for job in jobs) else ["experiment"]
    if not keys and len({job.seed for job in jobs}) > 1:
        keys = ["seed"]
    if not keys:
        raise UserError("--plot: these runs do not differ in any setting.")
    untrained = [value for job in jobs if (value := job.run.number("knn_top1_untrained")) is not None]
    points = [Point(job.run.name, {key: _value(job, key) for key in keys}, job.knn, _state(job)) for job in jobs]
    return Sweep(keys, points, mean(untrained) if untrained else None)


def axis_of(values: Sequence[Any], *, few_as_names: bool = False) -> Axis:
    """Numbers get a scale; other values, two at most, or `few_as_names`, stand beside each other."""
    different = _in_order(values)
    numbers = [value for value in different if isinstance(value, int | float) and not isinstance(value, bool)]
    usable = len(numbers) == len(different) and all(map(math.isfinite, numbers))
    if not usable or len(different) <= (MAX_CATEGORIES if few_as_names else 2):
        return Axis({value: (place + 0.5) / len(different) for place, value in enumerate(different)})
    low, high = min(numbers), max(numbers)
    if low > 0 and high >= LOG_FACTOR * low:
        pad = (high / low) ** 0.06
        return Axis({}, low / pad, high * pad, log=True)
    pad = (high - low) * 0.06
    return Axis({}, low - pad, high + pad)


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Different values: numbers by size, others as they came."""
    different = list(dict.fromkeys(values))
    return sorted(different) if all(isinstance(value, int | float) for value in different) else different


def _value(job: Job, key: str) -> Any:
    if key == "experiment":
        return PUBLISHED[job.row].name if job.row in PUBLISHED else job.experiment
    value = job.value(key)
    return value if isinstance(value, int | float | str) else str(value)


def _state(job: Job) -> str:
    if job.failure is not None:
        return "failed"
    return "pruned" if job.pruned else "finished" if job.finished else "under way"
