"""What happens around the training step: `logger`, `callbacks`."""

from dataclasses import dataclass, field

from dino_lightning.config.reliability import CheckpointConfig, NonfiniteConfig


@dataclass
class KNNConfig:
    """Weighted k-NN evaluation while training."""

    enabled: bool = True
    """Evaluate at all. Needs labels."""
    every_n_epochs: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbors, all evaluated in one pass. One larger than the bank is cut to the bank."""
    headline_k: int = 20
    """The k of `knn_top1`, of the progress bar and of the best checkpoint; must stand in `k`."""
    temperature: float = 0.07
    """Temperature of the votes exp(similarity / temperature)."""
    bank: int | None = None
    """Most training images in the bank, drawn evenly by seed; null takes all."""
    queries: int | None = None
    """Most validation images asked about, drawn evenly by seed; null takes all."""
    batch_size_per_device: int = 256
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
    after: str = "10%"
    """Duration at the start of the run that is not judged: fresh networks look collapsed (duration)."""
    patience: int = 10
    """Rows of the log, the latest, whose mean must show a collapse."""


@dataclass
class PicturesConfig:
    """Attention maps, patch tokens and nearest neighbors as pictures."""

    enabled: bool = True
    """Draw pictures at all."""
    every_n_epochs: int = 10
    """Epochs between pictures; the end of the run always has them."""
    images: int = 8
    """Validation images shown."""


@dataclass
class PruningConfig:
    """A run of a sweep that is worse than the others were at the same epoch ends early (docs/sweeps.md)."""

    enabled: bool = False
    """Compare at all, by Optuna's pruner, with the runs of the sweep that have finished. Needs `callbacks.knn` and
    `pip install "dino-lightning[optuna]"`."""
    warmup: str = "25%"
    """Duration at the start of the run that is not judged (duration)."""
    after_jobs: int = 4
    """Finished runs of the sweep, with a k-NN figure of the same epoch, before any run is ended."""
    keep_percent: float = 50.0
    """Percent of the finished runs that a run must keep up with: 50 is their median. What is compared is the run's best
    k-NN accuracy so far with theirs at this epoch."""


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
