"""Schedules as pure functions of the optimizer step, so that a resumed run reads the same values.

`step` is the index of an optimizer step, from 0. All end points are the original's: the learning rate of step 0 is
exactly 0, the warm-up reaches the base value at its last step and the cosine repeats it at its first, and no cosine
ever reaches its final value (at the last step it is one step short).
"""

import math
from dataclasses import dataclass

from dino_lightning.config.duration import Duration


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up from 0 to `base`, then half a cosine from `base` towards `final`."""

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        """Value at `step`; past the end of the run it is the final value."""
        if step < self.warmup_steps:
            # As linspace(0, base, warmup_steps): the last warm-up step has the base value already.
            return self.base * step / (self.warmup_steps - 1) if self.warmup_steps > 1 else 0.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class LinearWarmup:
    """Straight line from `start` to `final` over `warmup` positions, then `final`.

    A position is `step // steps_per_position`: with one epoch per position the value changes once an epoch, which is
    how the original moves the teacher's temperature.
    """

    start: float
    final: float
    warmup: int
    steps_per_position: int = 1

    def __call__(self, step: int) -> float:
        """Value at `step`; the last position of the warm-up has the final value already."""
        position = step // self.steps_per_position
        if position >= self.warmup:
            return self.final
        return self.start + (self.final - self.start) * position / max(1, self.warmup - 1)

    @classmethod
    def over(
        cls, duration: Duration, *, start: float, final: float, steps_per_epoch: int, total_steps: int
    ) -> "LinearWarmup":
        """The warm-up over a duration: once an epoch where it is given in whole epochs, else every step."""
        if duration.unit == "ep" and duration.amount.is_integer():
            return cls(start, final, int(duration.amount), steps_per_position=steps_per_epoch)
        return cls(start, final, duration.steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps))
