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
    """Network to use if the checkpoint contains both; null uses the one that the run evaluated, and the teacher of
    files from elsewhere."""
    imports: list[str] = field(default_factory=list)
    """Python files or modules with backbones of your own that `checkpoint` needs; imported first."""
    features: Annotated[str, OneOf("class", "mean_patch")] = "class"
    """Features of an image: `class` is a ViT's class token (the pooled features of other networks), `mean_patch` is the
    mean of the last block's patch tokens."""
    n_last_blocks: Annotated[int, AtLeast(1)] = 1
    """Number of last blocks whose class tokens are concatenated, deepest last; above 1 only for a ViT's
    `features=class`."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the center crop (pixels); null uses the size with which the checkpoint was evaluated."""
    image_resize: Annotated[int | None, AtLeast(2)] = None
    """Shorter side before the center crop (pixels); null keeps the checkpoint's ratio to `image_size`."""
    batch_size_per_device: Annotated[int | None, AtLeast(1)] = None
    """Images per forward pass and device; null uses the number that has as many pixels as 256 images with side 224, at
    most 1024."""
    data: DataConfig = MISSING
    """The images. No images are held out, and unreadable ones never stop the program (`max_bad_share` is 1)."""
    split: Annotated[str, OneOf("all", "train", "val")] = "all"
    """Split: `train`, `val`, or `all`, with the validation images after the training images."""
    trainer: DevicesConfig = field(default_factory=DevicesConfig)
    """Devices and precision."""
    output: Annotated[str, FilePath] = MISSING
    """Output file: `.parquet` (columns `name`, `label`, `embedding`), or `.npy` with the names in a `.csv` file next to
    it."""
    overwrite: bool = False
    """Overwrite an existing `output`."""
    seed: Annotated[int, Seed] = 0
    """Random seed of untrained networks (`checkpoint=untrained:…`)."""
    cpu_threads: Annotated[int | None, AtLeast(1)] = None
    """Number of PyTorch threads on a CPU; null divides the cores among the devices."""
    feature_cache: Annotated[str | None, FilePath] = "~/.cache/dino-lightning/features"
    """Folder in which finished blocks of 1024 images are cached, so that an interrupted command continues where it was;
    shared with `dino eval`. null disables the cache."""
