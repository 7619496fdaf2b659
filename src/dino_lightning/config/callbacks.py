"""What happens around the training step: `callbacks`."""

from dataclasses import dataclass, field
from typing import Annotated

from dino_lightning.config.ranges import AtLeast, Counts, Duration, OneOf, Positive, Range


@dataclass
class KNNConfig:
    """Weighted k-NN evaluation while training."""

    enabled: bool = True
    """Evaluate at all. Needs labels."""
    every_n_epochs: Annotated[int, AtLeast(1)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    k: Annotated[list[int], Counts] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbors, all evaluated in one pass. One larger than the bank is cut to the bank."""
    headline_k: int = 20
    """The k of `knn_top1`, of the progress bar and of the best checkpoint; must stand in `k`."""
    temperature: Annotated[float, Positive] = 0.07
    """Temperature of the votes exp(similarity / temperature)."""
    bank: Annotated[int | None, AtLeast(1)] = None
    """Most training images in the bank, drawn evenly by seed; null takes all."""
    queries: Annotated[int | None, AtLeast(1)] = None
    """Most validation images asked about, drawn evenly by seed; null takes all."""
    batch_size_per_device: Annotated[int, AtLeast(1)] = 256
    """Images per forward pass of the feature extraction."""
    baselines: bool = True
    """Before training, evaluate the untrained backbone and raw pixels (at 32 x 32) too."""


@dataclass
class CollapseConfig:
    """Alarms where all images come to look the same to the network."""

    enabled: bool = True
    """Watch at all."""
    stop: bool = False
    """End the run at an alarm instead of warning only."""
    after: Annotated[str, Duration] = "10%"
    """Duration at the start of the run that is not judged: fresh networks look collapsed (duration)."""
    patience: Annotated[int, AtLeast(1)] = 10
    """Rows of the log, the latest, whose mean must show a collapse."""


@dataclass
class PicturesConfig:
    """Attention maps, patch tokens and nearest neighbors as pictures."""

    enabled: bool = True
    """Draw pictures at all."""
    every_n_epochs: Annotated[int, AtLeast(1)] = 10
    """Epochs between pictures; the end of the run always has them."""
    images: Annotated[int, AtLeast(1)] = 8
    """Validation images shown."""


@dataclass
class PruningConfig:
    """A run of a sweep that is worse than the others were at the same epoch ends early (docs/sweeps.md)."""

    enabled: bool = False
    """Compare at all, by Optuna's pruner, with the runs of the sweep that have finished. Needs `callbacks.knn` and
    `pip install "dino-lightning[optuna]"`."""
    warmup: Annotated[str, Duration] = "25%"
    """Duration at the start of the run that is not judged (duration)."""
    after_jobs: Annotated[int, AtLeast(1)] = 4
    """Finished runs of the sweep, with a k-NN figure of the same epoch, before any run is ended."""
    keep_percent: Annotated[float, Range("a number above 0 and below 100", lambda value: 0 < value < 100)] = 50.0
    """Percent of the finished runs that a run must keep up with: 50 is their median. What is compared is the run's best
    k-NN accuracy so far with theirs at this epoch."""


@dataclass
class NonfiniteConfig:
    """What happens where the loss or a gradient of a step is not finite, on any rank.

    Overflows of `trainer.precision=16-mixed` are not meant: their loss scale deals with them, and they are counted.
    """

    policy: Annotated[str, OneOf("stop", "skip", "rollback")] = "stop"
    """`stop` ends the run, as the original does; `skip` leaves the step out; `rollback` takes weights and optimizer
    back to the last checkpoint and goes on behind the step, with the images and schedules that follow."""
    max_steps: Annotated[int, AtLeast(0)] = 10
    """Steps of a run that may be skipped or rolled back; one more ends it."""
    max_saved: Annotated[int, AtLeast(0)] = 3
    """Most steps of a run that are saved to `nonfinite/`, to be seen again with `dino replay FILE`."""


@dataclass
class CheckpointConfig:
    """What is kept in `checkpoints/`, and how often it is written.

    `last.ckpt` is written at the end of each epoch, when the run is told to end, and by the clock; the ones before it
    are `last-1.ckpt`, `last-2.ckpt`, ... There is `best_knn.ckpt` beside them.
    """

    every_n_minutes: Annotated[float, AtLeast(0)] = 30.0
    """Minutes between checkpoints within an epoch; 0 writes them at ends of epochs only."""
    keep_last: Annotated[int, AtLeast(1)] = 2
    """Latest checkpoints that are kept: where the last file is damaged, a run goes on from the one before it."""
    every_n_epochs: Annotated[int, AtLeast(0)] = 20
    """Epochs between checkpoints that are kept for good; 0 keeps none."""
    asynchronous: bool = False
    """Write files in a thread beside the training, from a copy of all states in the memory of the host."""


@dataclass
class CallbacksConfig:
    """What happens around the training step."""

    knn: KNNConfig = field(default_factory=KNNConfig)
    """Weighted k-NN evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    nonfinite: NonfiniteConfig = field(default_factory=NonfiniteConfig)
    """Losses and gradients that are not finite."""
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    """Collapse alarms."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """Runs of a sweep that end early."""
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    """Pictures."""
