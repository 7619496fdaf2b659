"""What happens around the training step: `callbacks`."""

from dataclasses import dataclass, field
from typing import Annotated

from dino_lightning.config.ranges import AtLeast, Counts, Duration, OneOf, Positive, Range


@dataclass
class KNNConfig:
    """Weighted k-NN evaluation during training."""

    enabled: bool = True
    """Run k-NN evaluation, which needs labels."""
    every_n_epochs: Annotated[int, AtLeast(1)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    k: Annotated[list[int], Counts] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbors, all evaluated in one pass; limited to the number of images in the bank."""
    headline_k: int = 20
    """The number of neighbors for `knn_top1`, the progress bar and the best checkpoint; one of `k`."""
    temperature: Annotated[float, Positive] = 0.07
    """Temperature of the votes exp(similarity / temperature)."""
    bank: Annotated[int | None, AtLeast(1)] = None
    """Largest number of training images in the bank, drawn evenly by seed; null uses all."""
    queries: Annotated[int | None, AtLeast(1)] = None
    """Largest number of validation images used as queries, drawn evenly by seed; null uses all."""
    batch_size_per_device: Annotated[int, AtLeast(1)] = 256
    """Images per forward pass of the feature extraction."""
    baselines: bool = True
    """Before training, also evaluate the untrained backbone and raw pixels (32 x 32)."""


@dataclass
class CollapseConfig:
    """Alarms if the outputs of all images become the same (collapse)."""

    enabled: bool = True
    """Watch for a collapse."""
    stop: bool = False
    """End the run at an alarm instead of only printing a warning."""
    after: Annotated[str, Duration] = "10%"
    """Time at the start of the run without alarms, because untrained networks look collapsed (duration)."""
    patience: Annotated[int, AtLeast(1)] = 10
    """Number of the latest log rows whose mean must indicate a collapse."""


@dataclass
class PicturesConfig:
    """Attention maps, patch tokens and nearest neighbors as pictures."""

    enabled: bool = True
    """Write pictures."""
    every_n_epochs: Annotated[int, AtLeast(1)] = 10
    """Epochs between pictures; they are always written at the end of the run."""
    images: Annotated[int, AtLeast(1)] = 8
    """Number of validation images in the pictures."""


@dataclass
class PruningConfig:
    """Early end of runs of a sweep that are worse than the others at the same epoch (docs/sweeps.md)."""

    enabled: bool = False
    """Compare the run with the finished runs of the sweep, using Optuna's pruner. Needs `callbacks.knn` and `pip
    install "dino-lightning[optuna]"`."""
    warmup: Annotated[str, Duration] = "25%"
    """Time at the start of the run without a comparison (duration)."""
    after_jobs: Annotated[int, AtLeast(1)] = 4
    """Number of finished runs with a k-NN accuracy at the same epoch that are needed before a run can be ended."""
    keep_percent: Annotated[float, Range("a number above 0 and below 100", lambda value: 0 < value < 100)] = 50.0
    """Percentile of the finished runs that a run must reach: 50 is their median. The run's best k-NN accuracy so far is
    compared with theirs at this epoch."""


@dataclass
class NonfiniteConfig:
    """Handling of steps whose loss or gradient is not finite on any rank.

    Overflows of `trainer.precision=16-mixed` do not count: the loss scaler handles them, and they are logged.
    """

    policy: Annotated[str, OneOf("stop", "skip", "rollback")] = "stop"
    """`stop` ends the run, as the original does; `skip` skips the step; `rollback` restores weights and optimizer from
    the last checkpoint and continues after the step, with the next images and schedule values."""
    max_steps: Annotated[int, AtLeast(0)] = 10
    """Number of steps that may be skipped or rolled back; one more ends the run."""
    max_saved: Annotated[int, AtLeast(0)] = 3
    """Largest number of steps that are saved to `nonfinite/` for `dino replay FILE`."""


@dataclass
class CheckpointConfig:
    """Which files are in `checkpoints/`, and how often they are written.

    `last.ckpt` is written at the end of each epoch, when the run is asked to stop, and every `every_n_minutes`. Older
    ones are `last-1.ckpt`, `last-2.ckpt`, and so on; `best_knn.ckpt` has the best k-NN accuracy.
    """

    every_n_minutes: Annotated[float, AtLeast(0)] = 30.0
    """Minutes between checkpoints within an epoch; 0 writes them only at the end of an epoch."""
    keep_last: Annotated[int, AtLeast(1)] = 2
    """Number of latest checkpoints to keep. If the last file is damaged, a run resumes from the previous one."""
    every_n_epochs: Annotated[int, AtLeast(0)] = 20
    """Epochs between checkpoints that are never deleted; 0 keeps none."""
    asynchronous: bool = False
    """Write files in a background thread, from a copy of all states in host memory."""


@dataclass
class CallbacksConfig:
    """What happens around the training step."""

    knn: KNNConfig = field(default_factory=KNNConfig)
    """Weighted k-NN evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    nonfinite: NonfiniteConfig = field(default_factory=NonfiniteConfig)
    """Steps with a non-finite loss or gradient."""
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    """Collapse alarms."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """Early end of bad runs of a sweep."""
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    """Pictures."""
