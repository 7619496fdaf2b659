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
    """The images; one of the classes below."""


@dataclass
class DataConfig(ImagesConfig):
    """Images to train on; one of the classes below."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 64
    """Images per device and micro-batch. The total batch is this x devices x nodes x accumulation."""
    num_workers: Annotated[int, AtLeast(0)] = 10
    """Number of loader processes per device; 0 loads in the training process."""
    prefetch_batches: Annotated[int, AtLeast(1)] = 2
    """Number of batches that each loader process prepares in advance."""
    pin_memory: bool = True
    """Copy batches to page-locked memory (only with an accelerator)."""
    holdout: Annotated[float, ShareBelowOne] = 0.1
    """Share of the images that are k-NN queries instead of training images, if the data has no validation split."""
    channels: Annotated[int, AtLeast(1)] = 3
    """Channels of an image: 3 converts all images to RGB, 1 to gray. Images must be stored with any other number."""
    value_range: Annotated[list[float] | None, StoredRange] = None
    """Stored values that become 0 and 255 (black and white), for images with more than 8 bits. null refuses such
    images, except 16-bit color images, of which PIL keeps the upper 8 bits."""
    nan_value: float | None = None
    """Value that replaces NaN and infinite pixels, such as 0 where nothing was measured; null refuses images that
    contain them."""
    apply_exif_rotation: bool = False
    """Rotate photographs according to their EXIF tag. The original does not."""
    on_error: Annotated[str, OneOf("skip", "raise")] = "skip"
    """What happens at an unreadable image: `skip` lists it in `bad_images.txt` and uses the next one, `raise` stops."""
    max_bad_share: Annotated[float, Share] = 0.05
    """Share of unreadable images above which the run stops."""
    cache: Annotated[str, OneOf("none", "ram", "disk")] = "none"
    """Where decoded training images, resized to `cache_resize`, are cached: `ram`, `disk` (in `cache_dir`) or
    `none`."""
    cache_resize: Annotated[int, AtLeast(1)] = 256
    """Shorter side of a cached image (pixels); smaller images are not resized."""
    cache_dir: Annotated[str, FilePath] = "~/.cache/dino-lightning"
    """Folder for cached images and for the file lists of large folders."""


@dataclass
class BuiltinData(DataConfig):
    """Procedurally drawn, labeled images with object masks. Nothing is downloaded."""

    train_images: Annotated[int, AtLeast(1)] = 6000
    """Number of training images."""
    val_images: Annotated[int, AtLeast(1)] = 1200
    """Number of validation images."""
    image_size: Annotated[int, AtLeast(16)] = 32
    """Side of an image (pixels)."""
    draw_seed: Annotated[int, AtLeast(0)] = 0
    """Random seed of the drawings (not of the training)."""


@dataclass
class FolderData(DataConfig):
    """Image files on disk, in `train/` and `val/`, in class folders, or in a flat folder without labels."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of the images."""


@dataclass
class ListingData(DataConfig):
    """Image files in a list: a text file with one path per line, or a CSV or TSV table."""

    path: Annotated[str, FilePath] = MISSING
    """Path of the list. A table has a header and ends in `.csv` or `.tsv`."""
    root: Annotated[str | None, FilePath] = None
    """Folder to which the paths are relative; null uses the folder of the list."""
    path_column: str = "path"
    """Column of the paths (tables only)."""
    label_column: str | None = None
    """Column of the class names or numbers (tables only); null for unlabeled images."""


@dataclass
class LandmarksData(DataConfig):
    """Google Landmarks v2: a CSV of image identifiers and folders named by their first three characters."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of the CSV file and the images, which are `0/1/2/012….jpg` in it or in its `train/`."""
    csv: Annotated[str, FilePath] = "train.csv"
    """CSV file in the folder: `train.csv` (id, url, landmark_id) or `train_clean.csv` (landmark_id, images)."""


@dataclass
class ArchiveData(DataConfig):
    """Images inside zip or tar files, read in place."""

    path: Annotated[str, FilePath] = MISSING
    """A `.zip` or `.tar` file, or a folder of them: one per split if one is named like `train.zip`, else one per
    class."""


@dataclass
class ParquetData(DataConfig):
    """Parquet files in the image layout of Hugging Face `datasets`, or a folder written by `save_to_disk`."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of `train*.parquet` (and `val*`, `validation*` or `test*`), or a folder of `Dataset.save_to_disk`."""
    image_column: str = "image"
    """Column of the encoded images."""
    label_column: str | None = "label"
    """Column of the integer labels; null for unlabeled images."""


@dataclass
class HuggingFaceData(DataConfig):
    """A dataset of the Hugging Face Hub, or a folder that `datasets.load_dataset` reads."""

    name: str = MISSING
    """Name on the Hub, or path of a folder."""
    subset: str | None = None
    """Name of the subset (`load_dataset`'s second argument)."""
    train_split: str = "train"
    """Split of the training images."""
    val_split: str | None = None
    """Split of the k-NN queries; null if there is none."""
    image_column: str = "image"
    """Column of the images."""
    label_column: str | None = "label"
    """Column of the integer labels; null for unlabeled images."""
    streaming: bool = False
    """Stream images during training instead of downloading them first. k-NN evaluation is not possible then."""
    images: Annotated[int | None, AtLeast(1)] = None
    """Images per epoch of a stream; null uses the number that the dataset declares."""
    shuffle_buffer: Annotated[int, AtLeast(1)] = 1000
    """Size of the shuffle buffer of each loader process when streaming (images)."""


@dataclass
class WebDatasetData(DataConfig):
    """WebDataset shards: local or remote tar files that are read from beginning to end."""

    shards: str = MISSING
    """Paths or URLs: `/data/train-{000000..000146}.tar`, `a.tar::b.tar`, `/data/*.tar`, or a folder of tar files."""
    images: Annotated[int, AtLeast(1)] = MISSING
    """Images per epoch."""
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp", "tif", "tiff", "npy"])
    """Extensions of the members that are images."""
    shuffle_buffer: Annotated[int, AtLeast(1)] = 1000
    """Size of the shuffle buffer of each loader process (images)."""


@dataclass
class TorchvisionData(DataConfig):
    """A dataset that torchvision downloads and reads."""

    name: Annotated[str, OneOf(*TORCHVISION_NAMES)] = MISSING
    """Name of the dataset. The unlabeled images of `stl10` and the validation images of `flowers102` and `dtd` are
    training images, too. The k-NN queries are the test images."""
    path: Annotated[str, FilePath] = "data"
    """Folder of the downloaded files."""
    download: bool = True
    """Download the data if it is not in `path`."""
