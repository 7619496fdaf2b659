"""What keeps a run alive: `callbacks.checkpoint`, `callbacks.nonfinite`."""

from dataclasses import dataclass


@dataclass
class NonfiniteConfig:
    """What happens where the loss or a gradient of a step is not finite, on any rank.

    Overflows of `trainer.precision=16-mixed` are not meant: their loss scale deals with them, and they are counted.
    """

    policy: str = "stop"
    """`stop` ends the run, as the original does; `skip` leaves the step out; `rollback` takes weights and optimizer
    back to the last checkpoint and goes on behind the step, with the images and schedules that follow."""
    max_steps: int = 10
    """Steps of a run that may be skipped or rolled back; one more ends it."""
    max_saved: int = 3
    """Most steps of a run that are saved to `nonfinite/`, to be seen again with `dino replay FILE`."""


@dataclass
class CheckpointConfig:
    """What is kept in `checkpoints/`, and how often it is written.

    `last.ckpt` is written at the end of each epoch, when the run is told to end, and by the clock; the ones before it
    are `last-1.ckpt`, `last-2.ckpt`, ... There is `best_knn.ckpt` beside them.
    """

    every_n_minutes: float = 30.0
    """Minutes between checkpoints within an epoch; 0 writes them at ends of epochs only."""
    keep_last: int = 2
    """Latest checkpoints that are kept: where the last file is damaged, a run goes on from the one before it."""
    every_n_epochs: int = 20
    """Epochs between checkpoints that are kept for good; 0 keeps none."""
    asynchronous: bool = False
    """Write files in a thread beside the training, from a copy of all states in the memory of the host."""
