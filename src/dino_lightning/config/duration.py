"""Lengths of training with a unit, such as `10ep`, `500it` or `10%`."""

import re
from dataclasses import dataclass

from dino_lightning.errors import UserError


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit: `"10ep"`, `"500it"` or `"10%"`."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str, *, key: str) -> "Duration":
        """Read a duration; `key` is named in the error of an unreadable one."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ep|it|%)\s*", str(text))
        if not match:
            raise UserError(
                f"{key}={text} is not a duration: write a number and a unit, such as '10ep' (epochs), '500it' "
                "(optimizer steps) or '10%' (of the run)."
            )
        duration = cls(float(match[1]), match[2])
        if duration.unit == "it" and not duration.amount.is_integer():
            raise UserError(f"{key}={text}: optimizer steps are whole numbers, such as '{round(duration.amount)}it'.")
        if duration.unit == "%" and duration.amount > 100:
            raise UserError(f"{key}={text} is longer than the run: at most '100%'.")
        return duration

    def steps(self, *, steps_per_epoch: int, total_steps: int) -> int:
        """The duration in optimizer steps, rounded to the nearest."""
        match self.unit:
            case "ep":
                return round(self.amount * steps_per_epoch)
            case "it":
                return int(self.amount)
            case _:
                return round(self.amount / 100 * total_steps)
