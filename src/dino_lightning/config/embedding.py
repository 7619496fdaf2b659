"""Features of images, written to a file: `dino embed`."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from dino_lightning.config.data import DataConfig
from dino_lightning.config.ranges import AtLeast, FilePath, OneOf, Seed
from dino_lightning.config.trainer import DevicesConfig


@dataclass
class EmbedConfig:
    """Features of many images, in one file: `dino embed`."""

    checkpoint: str = MISSING
    """The network: whatever `checkpoint=` of `dino eval` takes (docs/evaluation.md)."""
    checkpoint_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Which network of a checkpoint that holds several: `teacher` or `student`; null for the one that the run
    evaluated, and for the teacher of files of another origin."""
    features: Annotated[str, OneOf("class", "mean_patch")] = "class"
    """What stands for an image: `class`, a ViT's class token (the pooled features of other networks), or `mean_patch`,
    the mean of the last block's patch tokens."""
    n_last_blocks: Annotated[int, AtLeast(1)] = 1
    """Class tokens of this many last blocks, one after another, deepest last; above 1 for a ViT's `features=class`."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the center that the network sees (pixels); null takes what the checkpoint was evaluated with."""
    image_resize: Annotated[int | None, AtLeast(2)] = None
    """Shorter side before the center crop (pixels); null keeps the checkpoint's ratio to `image_size`."""
    batch_size_per_device: Annotated[int | None, AtLeast(1)] = None
    """Images per forward pass and device; null for as many as have the pixels of 256 images of side 224, at most
    1024."""
    data: DataConfig = MISSING
    """The images. Unlike in training, none are held out, and unreadable ones never stop it (`max_bad_share` is 1)."""
    split: Annotated[str, OneOf("all", "train", "val")] = "all"
    """Which of them: `train`, `val`, or `all`, the validation images behind the training images."""
    trainer: DevicesConfig = field(default_factory=DevicesConfig)
    """Devices and precision."""
    output: Annotated[str, FilePath] = MISSING
    """File of the features: `.parquet` (columns `name`, `label`, `embedding`), or `.npy` with the names beside it in a
    `.csv`."""
    overwrite: bool = False
    """Write over an `output` that is there."""
    seed: Annotated[int, Seed] = 0
    """Seed of fresh weights (`checkpoint=untrained:…`)."""
    cpu_threads: Annotated[int | None, AtLeast(1)] = None
    """Threads of PyTorch on a CPU; null for one for each core, shared by the devices."""
    feature_cache: Annotated[str | None, FilePath] = "~/.cache/dino-lightning/features"
    """Folder in which finished blocks of 1024 images are kept, so that a command that was killed goes on where it was;
    shared with `dino eval`. null keeps nothing."""
