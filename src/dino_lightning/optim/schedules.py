"""Schedules as pure functions of the optimizer step, so that a resumed run gets the same values.

`step` is the index of an optimizer step, from 0. All end points are those of the original: the learning rate of step 0
is 0, the warm-up reaches the base value at its last step, the cosine repeats it at its first step, and no cosine
reaches its final value (the run ends one step earlier).
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
        """Value at `step`; after the end of the run the final value."""
        if step < self.warmup_steps:
            # As linspace(0, base, warmup_steps): the last warm-up step already has the base value.
            return self.base * step / (self.warmup_steps - 1) if self.warmup_steps > 1 else 0.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class LinearWarmup:
    """Straight line from `start` to `final` over `warmup` positions, then `final`.

    A position is `step // steps_per_position`: with one epoch per position the value changes once per epoch, as the
    teacher's temperature in the original.
    """

    start: float
    final: float
    warmup: int
    steps_per_position: int = 1

    def __call__(self, step: int) -> float:
        """Value at `step`; the last position of the warm-up already has the final value."""
        position = step // self.steps_per_position
        if position >= self.warmup:
            return self.final
        return self.start + (self.final - self.start) * position / max(1, self.warmup - 1)

    @classmethod
    def over(
        cls, duration: Duration, *, start: float, final: float, steps_per_epoch: int, total_steps: int
    ) -> "LinearWarmup":
        """The warm-up over a duration: it changes once per epoch for whole epochs, otherwise every step."""
        if duration.unit == "ep" and duration.amount.is_integer():
            return cls(start, final, int(duration.amount), steps_per_position=steps_per_epoch)
        return cls(start, final, duration.steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps))
