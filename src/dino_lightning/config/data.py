"""The images: `data`, one class for each kind of source."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from dino_lightning.config.ranges import AtLeast, FilePath, OneOf, Range, Share, ShareBelowOne

TORCHVISION_NAMES = ("cifar10", "cifar100", "stl10", "svhn", "food101", "flowers102", "dtd", "oxford_iiit_pet")
"""Values of `data.name` for `TorchvisionData`."""
StoredRange = Range(
    "two numbers, the smaller first", lambda value: len(value) == 2 and -math.inf < value[0] < value[1] < math.inf
)


@dataclass
class ImagesConfig:
    """The images; one of the children below."""


@dataclass
class DataConfig(ImagesConfig):
    """Images to train on; one of the children below."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 64
    """Images per device and micro-batch. Images per optimizer step: this x devices x nodes x accumulation."""
    num_workers: Annotated[int, AtLeast(0)] = 10
    """Loader processes per device; 0 loads in the training process."""
    prefetch_batches: Annotated[int, AtLeast(1)] = 2
    """Batches that each loader process keeps ready."""
    pin_memory: bool = True
    """Copy batches to page-locked memory (only where there is an accelerator)."""
    holdout: Annotated[float, ShareBelowOne] = 0.1
    """Share of the images kept from training as k-NN queries, where the data has no validation split (0 to 1)."""
    channels: Annotated[int, AtLeast(1)] = 3
    """Channels of an image. 3: whatever is stored becomes RGB. 1: gray. Others must be stored so."""
    value_range: Annotated[
        list[float] | None,
        StoredRange,
    ] = None
    """Stored values that become 0 and 255 (black and white), for images of more than 8 bits; null refuses those, except
    16-bit color, of which PIL keeps the upper 8 bits."""
    nan_value: float | None = None
    """Stored value for which NaN and infinite ones stand, such as 0 where nothing was measured; null refuses images
    that hold some."""
    apply_exif_rotation: bool = False
    """Turn photographs as their EXIF tag says. The original does not."""
    on_error: Annotated[str, OneOf("skip", "raise")] = "skip"
    """At an image that cannot be read: `skip` takes the next one and names it in `bad_images.txt`, `raise` stops."""
    max_bad_share: Annotated[float, Share] = 0.05
    """Share of unreadable images above which the run stops (0 to 1)."""
    cache: Annotated[str, OneOf("none", "ram", "disk")] = "none"
    """Keep the decoded training images, shrunk to `cache_resize`: `ram`, `disk` (in `cache_dir`), or `none`."""
    cache_resize: Annotated[int, AtLeast(1)] = 256
    """Shorter side of a kept image (pixels); smaller images stay as they are."""
    cache_dir: Annotated[str, FilePath] = "~/.cache/dino-lightning"
    """Folder for kept images and for the lists of large folders."""


@dataclass
class BuiltinData(DataConfig):
    """Procedurally drawn, labeled pictures with object masks: nothing to download."""

    train_images: Annotated[int, AtLeast(1)] = 6000
    """Number of training images."""
    val_images: Annotated[int, AtLeast(1)] = 1200
    """Number of validation images."""
    image_size: Annotated[int, AtLeast(8)] = 32
    """Side of an image (pixels)."""
    draw_seed: Annotated[int, AtLeast(0)] = 0
    """Seed of the drawings (not of the training)."""


@dataclass
class FolderData(DataConfig):
    """Image files on disk: `train/` and `val/`, or class folders, or a flat folder without labels."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of the images."""


@dataclass
class ListingData(DataConfig):
    """Image files named by a list: a text file with one path per line, or a CSV or TSV table."""

    path: Annotated[str, FilePath] = MISSING
    """The list. A table has a header and ends in `.csv` or `.tsv`."""
    root: Annotated[str | None, FilePath] = None
    """Folder to which the paths are relative; null for the folder of the list."""
    path_column: str = "path"
    """Column of the paths (tables only)."""
    label_column: str | None = None
    """Column of the class, a name or a number (tables only); null for images without labels."""


@dataclass
class LandmarksData(DataConfig):
    """Google Landmarks v2: a CSV of image identifiers and folders named by their first three characters."""

    path: Annotated[str, FilePath] = MISSING
    """Folder that holds the CSV and the images, `0/1/2/012….jpg` below it or below its `train/`."""
    csv: Annotated[str, FilePath] = "train.csv"
    """The list in it: `train.csv` (id, url, landmark_id), or `train_clean.csv` (landmark_id, images)."""


@dataclass
class ArchiveData(DataConfig):
    """Images inside zip or tar files, read in place."""

    path: Annotated[str, FilePath] = MISSING
    """A `.zip` or `.tar`, or a folder of them: splits where one is named like `train.zip`, else a class each."""


@dataclass
class ParquetData(DataConfig):
    """A folder of parquet files in the Hugging Face `datasets` image layout, or one written by `save_to_disk`."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of `train*.parquet` (and `val*`, `validation*` or `test*`), or of `Dataset.save_to_disk`."""
    image_column: str = "image"
    """Column of the encoded images."""
    label_column: str | None = "label"
    """Column of the integer labels; null for images without labels."""


@dataclass
class HuggingFaceData(DataConfig):
    """A data set of the Hugging Face Hub, or a folder that `datasets.load_dataset` reads."""

    name: str = MISSING
    """Name on the Hub, or a folder."""
    subset: str | None = None
    """Name of the subset (`load_dataset`'s second argument)."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split of the k-NN queries; null for none."""
    image_column: str = "image"
    """Column of the images."""
    label_column: str | None = "label"
    """Column of the integer labels; null for images without labels."""
    streaming: bool = False
    """Read while training instead of downloading first. There is no k-NN evaluation then."""
    images: Annotated[int | None, AtLeast(1)] = None
    """Images of an epoch of a stream; a Hugging Face data set may say so itself (null)."""
    shuffle_buffer: Annotated[int, AtLeast(1)] = 1000
    """Images that each loader process draws from when streaming."""


@dataclass
class WebDatasetData(DataConfig):
    """WebDataset shards: tar files, local or at URLs, read from beginning to end."""

    shards: str = MISSING
    """Paths or URLs: `/data/train-{000000..000146}.tar`, `a.tar::b.tar`, `/data/*.tar`, or a folder of tar files."""
    images: Annotated[int, AtLeast(1)] = MISSING
    """Images of an epoch."""
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp", "tif", "tiff", "npy"])
    """Endings of the members that are images."""
    shuffle_buffer: Annotated[int, AtLeast(1)] = 1000
    """Images that each loader process draws from."""


@dataclass
class TorchvisionData(DataConfig):
    """A data set that torchvision downloads and reads."""

    name: Annotated[str, OneOf(*TORCHVISION_NAMES)] = MISSING
    """`cifar10`, `cifar100`, `stl10` (its unlabeled images train too), `svhn`, `food101`, `flowers102`, `dtd` (the
    validation images of both train too) or `oxford_iiit_pet`. The k-NN queries are the test images."""
    path: Annotated[str, FilePath] = "data"
    """Folder for the download."""
    download: bool = True
    """Download the data when `path` lacks it."""
